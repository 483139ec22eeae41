"""`python -m medusa_ray.cli`, where the command `medusa-ray` is not on the path."""

from medusa_ray.cli import main

main()
