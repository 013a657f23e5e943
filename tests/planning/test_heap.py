from rankwise.planning.heap import Tape, most_alive, most_resident


def test_most_alive_counts_what_is_there_at_once():
    tape = Tape()
    a, b = tape.new(100), tape.new(50)
    tape.drop(a)
    c = tape.new(60)
    assert tape.alive == 110
    tape.drop(b, c)
    assert (tape.alive, most_alive(tape.events)) == (0, 150)


def test_a_heap_takes_a_gap_again_and_one_that_is_too_small_not():
    tape = Tape()
    blocks = [tape.new(10_000) for _ in range(10)]
    full = most_resident(tape.events)
    assert 100_000 <= full < 102_000
    tape.drop(blocks[2], blocks[3])
    tape.new(15_000)
    assert most_resident(tape.events) == full  # neighbours that are free became one gap
    tape.drop(blocks[6])
    tape.new(20_000)
    assert full + 19_000 < most_resident(tape.events) < full + 21_000


def test_what_stays_between_what_goes_makes_gaps():
    def steps(stays: bool) -> list[tuple[int, int]]:
        tape = Tape()
        for size in (40_000, 70_000):
            blocks = []
            for _ in range(20):
                blocks.append(tape.new(size))
                if stays:
                    tape.new(200)
            tape.drop(*blocks)
        return tape.events

    alone, between = (most_resident(steps(stays)) - most_alive(steps(stays)) for stays in (False, True))
    assert alone < 10_000
    assert between > 500_000


def test_large_blocks_go_back_to_the_system():
    tape = Tape()
    for _ in range(3):
        tape.drop(tape.new(40 * 2**20))
    assert most_resident(tape.events) == 40 * 2**20
