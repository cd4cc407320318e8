"""What `trainer evaluate` says of its table."""

from trainer.evals.command import verdict


def result(top1: float, *, rank_me: float = 50.0, feature_std: float = 0.6) -> dict[str, float]:
    return {"top1": top1, "top5": 80.0, "num_images": 400, "rank_me": rank_me, "feature_std": feature_std}


def test_the_verdict_states_margins_and_their_error() -> None:
    (line,) = verdict({"pixels": result(20), "untrained": result(25), "student": result(50)})
    assert "student: +30.00 over pixels, +25.00 over untrained" in line
    assert "one standard error is 2.50" in line
    assert "have not collapsed" in line


def test_the_verdict_calls_a_collapse_by_its_name() -> None:
    for collapsed in (result(10, rank_me=1.0), result(10, feature_std=0.01)):
        assert "HAVE COLLAPSED" in verdict({"pixels": result(20), "untrained": result(25), "student": collapsed})[0]
