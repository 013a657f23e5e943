"""What can be made again is kept in the home folder, or, where that is closed, for as long as the process lives."""

import subprocess
import sys
from pathlib import Path

from rankwise.cache import cache_folder


def test_it_is_in_the_home_folder_and_the_same_on_every_call(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = cache_folder()
    assert folder == tmp_path / ".cache" / "rankwise" == cache_folder()
    assert folder.is_dir()
    assert not list(folder.iterdir()), "trying it out has left something behind"


def test_what_is_there_already_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    kept = tmp_path / ".cache" / "rankwise" / "models" / "one"
    kept.mkdir(parents=True)
    assert cache_folder() == kept.parents[1]
    assert kept.is_dir()


def test_where_the_home_folder_is_closed_a_temporary_one_serves_until_the_end(tmp_path):
    """A file stands where the home folder should be: not even root can make a folder in it."""
    home = tmp_path / "home"
    home.write_text("closed")
    script = """
from rankwise.cache import cache_folder
folder = cache_folder()
assert folder == cache_folder()
(folder / "file").write_text("kept while it lasts")
print(folder)
"""
    env = {"HOME": str(home), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=env)
    place = Path(done.stdout.strip())
    assert place.parent == tmp_path
    assert place.name.startswith("rankwise-")
    assert not place.exists()
    assert home.read_text() == "closed"
