import itertools

from hypothesis import given
from hypothesis import strategies as st

from rankwise.reports.run import Site
from rankwise.reports.sites import group_sites
from tests.reports.folders import record

SITE = Site(rank=16, scale=2.0, alpha=32.0)
SMALL = Site(rank=4, scale=8.0, alpha=32.0)


def expand(where: str, names: tuple[str, ...]) -> set[str]:
    """Every path that a group's words stand for."""
    parts = []
    for part in [*where.split("."), ""][:-1] if where else []:
        pieces = part.strip("{}").split(", ")
        if pieces[0].partition("–")[0].isdigit():
            ends = [piece.partition("–") for piece in pieces]
            parts.append([str(n) for first, _, last in ends for n in range(int(first), int(last or first) + 1)])
        else:
            parts.append(pieces)
    return {".".join(path) for path in itertools.product(*parts, names)}


def test_a_language_model_is_two_lines():
    sites = {path: Site(**site) for path, site in record()["sites"].items()}
    attention, mlp = group_sites(sites)
    assert attention.where == "model.layers.0–29.self_attn"
    assert attention.names == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (attention.sites, attention.rank, attention.scale) == (120, 16, 2.0)
    assert (mlp.where, mlp.sites) == ("model.layers.0–29.mlp", 90)


def test_another_rank_is_another_line():
    sites = {f"layers.{i}.q": SMALL if i in (3, 4) else SITE for i in range(8)}
    assert [(group.where, group.rank) for group in group_sites(sites)] == [("layers.{0–2, 5–7}", 16), ("layers.3–4", 4)]


def test_a_layer_at_the_top_has_no_place():
    (group,) = group_sites({"lm_head": SITE})
    assert (group.where, group.names) == ("", ("lm_head",))


@given(
    st.dictionaries(
        st.tuples(st.sampled_from("ab"), st.integers(0, 5), st.sampled_from(["x", "y"]), st.integers(0, 2)),
        st.sampled_from([SITE, SMALL]),
        max_size=40,
    ),
    st.booleans(),
)
def test_the_groups_say_every_site_once_and_no_other(chosen, deep):
    sites = {
        ".".join(map(str, path if deep else (path[0], path[1], path[2] + str(path[3])))): site
        for path, site in chosen.items()
    }
    said = [path for group in group_sites(sites) for path in expand(group.where, group.names)]
    assert sorted(said) == sorted(sites)
    assert sum(group.sites for group in group_sites(sites)) == len(sites)
