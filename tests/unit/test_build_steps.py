"""How far a build has come, from what its builder says."""

from __future__ import annotations

import pytest

from tasks.build_steps import BuildSteps, is_bookkeeping

ENGINE = """\
Step 1/4 : FROM base:1
 ---> 8ab1f4c2d7e1
Step 2/4 : COPY . /app
 ---> 91d5c2f00a11
Step 3/4 : RUN make
 ---> Running in 02c0f6a3b1d2
building 7
Removing intermediate container 02c0f6a3b1d2
Step 4/4 : CMD ["/app"]
Successfully built 3f1a"""
BUILDKIT = """\
#1 [internal] load build definition from Dockerfile
#4 [1/3] FROM docker.io/library/base:1
#5 [2/3] COPY . /app
#5 DONE 0.1s
#6 [3/3] RUN make
#6 0.210 building 7
#7 exporting to image"""


def percents(text: str) -> list[float]:
    """The percentages that the lines of a build lead to."""
    steps = BuildSteps()
    return [round(steps.percent) for line in text.splitlines() if steps.hear(line)]


def test_each_step_that_begins_tells_how_many_are_done() -> None:
    """As the engine's own builder says them, and as BuildKit does; other lines say nothing of it."""
    assert percents(ENGINE) == [0, 25, 50, 75]
    assert percents(BUILDKIT) == [0, 33, 67]


def test_the_step_itself_is_told() -> None:
    """What it does, without numbers."""
    steps = BuildSteps()
    assert steps.hear("#7 [linux/amd64 builder 2/5] RUN make all")
    assert steps.told == "RUN make all"
    assert not steps.hear("#7 0.3 [2/5] of the tests passed")
    assert steps.told == "RUN make all"


def test_a_build_of_several_stages_never_goes_back() -> None:
    """A stage that is heard of late adds its steps; two stages of BuildKit go on at once."""
    told = percents(
        "#5 [builder 1/2] FROM a\n#6 [builder 2/2] RUN x\n#7 [stage-1 1/4] FROM b\n#8 [stage-1 4/4] RUN y"
    )
    assert told == [0, 50, 50, 67]


@pytest.mark.parametrize("line", ["Step 1/0 : FROM a", "#1 [1/0] FROM a"])
def test_a_builder_that_counts_to_nothing_breaks_nothing(line: str) -> None:
    """What is shown must not end a build."""
    steps = BuildSteps()
    assert steps.hear(line)
    assert steps.percent == 0


def test_the_builders_bookkeeping_is_told_from_what_it_does() -> None:
    """Ids and intermediate containers; everything that a command printed stays."""
    kept = [line for line in ENGINE.splitlines() if not is_bookkeeping(line)]
    assert kept == [
        *("Step 1/4 : FROM base:1", "Step 2/4 : COPY . /app", "Step 3/4 : RUN make", "building 7"),
        *('Step 4/4 : CMD ["/app"]', "Successfully built 3f1a"),
    ]
