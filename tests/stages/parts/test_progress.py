from warpline.stages.parts.progress import StageProgress, console


def test_without_a_terminal_every_tenth_is_one_plain_line():
    with console.capture() as capture, StageProgress("sft", 25, done=3) as progress:
        for step in range(3, 25):
            progress.advance(f"loss {step}")
    lines = capture.get().splitlines()
    assert lines[0].split() == ["sft", "5/25", "loss", "4"] and lines[-1].split() == ["sft", "25/25", "loss", "24"]
    assert len(lines) == 9


def test_other_ranks_are_silent():
    with console.capture() as capture, StageProgress("sft", 2, shown=False) as progress:
        progress.advance()
        progress.advance()
    assert capture.get() == ""
