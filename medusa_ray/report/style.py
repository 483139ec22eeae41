"""How report.html and compare.html look: on a desk, on a phone, and on paper."""

STYLE = """
:root { --ink: #1c2733; --quiet: #5b6673; --rule: #d9dee4; --pale: #f5f7f9;
  --good: #1a6e3c; --bad: #b3261e; --open: #7a5b00; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 28px 32px 64px; color: var(--ink); background: #fff;
  font: 15px/1.5 "Segoe UI", "Helvetica Neue", Helvetica, Arial, "Liberation Sans", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
h1 { font-size: 22px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 44px 0 4px; padding-top: 18px; border-top: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 0 0 2px; }
p { margin: 6px 0; }
.quiet, figcaption { color: var(--quiet); font-size: 13px; line-height: 1.45; }
.verdict { margin: 20px 0; padding: 18px 22px; border-radius: 6px; color: #fff; background: var(--open); }
.verdict.ship { background: var(--good); }
.verdict.no { background: var(--bad); }
.verdict strong { display: block; font-size: 28px; line-height: 1.2; margin-bottom: 6px; }
.verdict p { margin: 0; max-width: 100ch; }
.tiles { display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 12px; }
.tile { background: var(--pale); border-radius: 6px; padding: 12px 14px; }
.tile b { display: block; font-size: 25px; line-height: 1.25; }
.tile span { display: block; font-size: 13px; line-height: 1.4; color: var(--quiet); }
.tile span:first-child { color: var(--ink); font-weight: 600; }
.caveat { margin: 14px 0; padding: 10px 16px; border-left: 4px solid var(--bad); background: #fbeeed; }
.scroll { overflow-x: auto; margin: 12px 0 6px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
table.narrow { width: auto; min-width: min(100%, 560px); }
th { text-align: right; vertical-align: bottom; font-size: 12.5px; line-height: 1.3; color: var(--quiet);
  font-weight: 600; border-bottom: 1.5px solid var(--ink); padding: 4px 8px; }
td { text-align: right; padding: 5px 8px; white-space: nowrap; }
th.text, td.text { text-align: left; }
tr.group td { border-top: 1px solid var(--rule); }
tr.medusa td { background: #eef4fa; font-weight: 600; }
td.gain { background: #e3f2e8; } td.loss { background: #fbe3e1; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr));
  gap: 30px 36px; margin-top: 16px; }
figure { margin: 0; max-width: 640px; break-inside: avoid; }
figure:has(.wide) { grid-column: 1 / -1; max-width: none; }
svg { display: block; width: 100%; height: auto; overflow: visible; stroke-linejoin: round; margin: 6px 0; }
p.quiet + h3 { margin-top: 22px; }
svg.wide { min-width: 600px; }
dl { display: grid; grid-template-columns: minmax(130px, 190px) 1fr; gap: 6px 18px; font-size: 14px; }
dt { font-weight: 600; overflow-wrap: anywhere; }
dd { margin: 0; max-width: 90ch; overflow-wrap: anywhere; }
pre { background: var(--pale); padding: 12px 14px; border-radius: 6px; font-size: 12px; line-height: 1.4;
  white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; margin: 8px 0; }
@media (max-width: 1000px) {
  .tiles { grid-template-columns: repeat(3, 1fr); }
  table { font-size: 12.5px; } th { font-size: 12px; } th, td { padding: 4px 5px; }
}
@media (max-width: 640px) {
  body { padding: 18px 16px 40px; } .tiles { grid-template-columns: repeat(2, 1fr); }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 12px; } h2 { break-after: avoid; margin-top: 24px; }
  .scroll { overflow: visible; } svg.wide { min-width: 0; } table { font-size: 9.5px; } th { font-size: 9px; }
  th, td { padding: 3px 4px; }
  .pictures { grid-template-columns: 1fr 1fr; gap: 18px 20px; }
}
"""
