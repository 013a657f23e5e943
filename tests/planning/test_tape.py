from rankwise.planning.tape import Tape, most_alive


def test_most_alive_counts_what_is_there_at_once():
    tape = Tape()
    a, b = tape.new(100), tape.new(50)
    tape.drop(a)
    c = tape.new(60)
    assert tape.alive == 110
    tape.drop(b, c)
    assert (tape.alive, most_alive(tape.events)) == (0, 150)
