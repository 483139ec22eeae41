"""Pages: who holds which, and which beginnings of prompts are kept for whom."""

import torch

from medusa_ray.medusa.cache import PAGE_SIZE, KVShape, PagedCache


def cache_of(num_pages: int) -> PagedCache:
    return PagedCache([KVShape(1, 4, 4)], num_pages, torch.float32, torch.device("cpu"))


def prompt(*pages: int, rest: int = 5) -> list[int]:
    """A prompt whose pages are each full of one token, and some more tokens."""
    return [token for token in pages for _ in range(PAGE_SIZE)] + [9] * rest


def hold(cache: PagedCache, prompt_ids: list[int]) -> list[int]:
    """Pages of a sequence with this prompt, as the scheduler takes them, its prompt then in the cache."""
    shared = cache.share(prompt_ids)
    pages = shared + cache.take(PagedCache.pages_for(len(prompt_ids)) - len(shared))
    cache.keep(prompt_ids, pages)
    return pages


def test_prompts_that_begin_alike_share_the_pages_of_that_beginning() -> None:
    cache = cache_of(10)
    first, second = hold(cache, prompt(1, 2, 3)), hold(cache, prompt(1, 2, 4))
    assert first[:2] == second[:2]
    assert not set(first[2:]) & set(second[2:])
    assert cache.num_free_pages == 10 - 6
    assert hold(cache, prompt(2, 2))[0] not in first  # the same page behind another beginning is another one


def test_a_whole_prompt_is_never_shared() -> None:
    """Its last token must go through the base, or nothing would say what comes next."""
    cache = cache_of(10)
    pages = hold(cache, prompt(1, 2, rest=0))
    assert cache.share(prompt(1, 2, rest=0)) == pages[:1]


def test_a_beginning_outlives_its_sequence_until_its_room_is_needed() -> None:
    cache = cache_of(4)
    pages = hold(cache, prompt(1, 2))
    cache.give_back(pages)
    assert cache.num_free_pages == 4
    assert cache.share(prompt(1, 2)) == pages[:2]
    cache.give_back(pages[:2])
    taken = cache.take(4)
    assert sorted(taken) == [1, 2, 3, 4]
    assert cache.share(prompt(1, 2)) == []


def test_the_longest_unused_beginning_goes_first_and_its_end_before_its_start() -> None:
    cache = cache_of(5)
    old, new = hold(cache, prompt(1, 2, rest=0)), hold(cache, prompt(3, 4, rest=0))
    cache.give_back(old)
    cache.give_back(new)
    cache.give_back(cache.take(2))  # the page that was never used, and one more
    assert [len(cache.share(prompt(*pages))) for pages in ((1, 2), (3, 4))] == [1, 2]


def test_a_shared_page_is_free_only_when_its_last_user_has_gone() -> None:
    cache = cache_of(6)
    first, second = hold(cache, prompt(1)), hold(cache, prompt(1))
    cache.give_back(first)
    assert cache.num_free_pages == 6 - 2
    cache.give_back(second)
    assert cache.num_free_pages == 6
