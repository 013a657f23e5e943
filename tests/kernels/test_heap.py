import platform

from rankwise.kernels.heap import keep_freed_memory, share_one_heap, without_thread_cache

GLIBC = platform.libc_ver()[0] == "glibc"


def test_telling_glibc_to_keep_memory_is_harmless_twice_and_where_there_is_none():
    first = keep_freed_memory()
    assert keep_freed_memory() == first
    assert first == GLIBC


def test_threads_can_be_given_one_heap():
    assert share_one_heap() == GLIBC


def test_the_environment_gains_one_tunable_and_loses_nothing():
    asked = {"HOME": "/root", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    found = without_thread_cache(asked)
    assert found["HOME"] == "/root"
    assert found["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1" + ":glibc.malloc.tcache_count=0" * GLIBC
    assert without_thread_cache(found) == found
    assert ("GLIBC_TUNABLES" in without_thread_cache({})) == GLIBC


def test_what_somebody_has_asked_for_stands():
    asked = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}
    assert without_thread_cache(asked) == asked
