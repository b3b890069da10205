"""What a step frees, the next one has again without asking the system."""

import platform
import resource

import pytest
import torch

from tiglon.train.memory import kept

MIB = 1 << 20
PAGE = resource.getpagesize()
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")


def faults() -> int:
    """Pages that were asked of the system so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident() -> int:
    """Bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def step() -> None:
    torch.ones(64 * MIB // 4)


def asked_by_later_steps() -> int:
    """Pages that twenty steps after the first five ask for."""
    for _ in range(5):
        step()
    before = faults()
    for _ in range(20):
        step()
    return faults() - before


@glibc
def test_memory_is_asked_for_by_the_first_steps_alone_and_given_back_at_the_end():
    before = resident()
    with kept():
        assert asked_by_later_steps() < 64 * MIB / PAGE
        assert resident() - before > 60 * MIB
    assert resident() - before < 20 * MIB


@glibc
def test_a_training_inside_another_ends_nothing():
    with kept():
        with kept():
            pass
        assert asked_by_later_steps() < 64 * MIB / PAGE


@glibc
def test_it_is_given_back_after_an_error_too():
    before = resident()
    with pytest.raises(RuntimeError, match="shape"), kept():
        torch.ones(64 * MIB // 4).view(3, 5)
    assert resident() - before < 20 * MIB
