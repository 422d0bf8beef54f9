"""The loop of ranks other than 0: run the steps, scores and completions that rank 0 asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from backends.interface import Batch, NonFinite, OutOfMemory, Session
from backends.process_messages import batch_of, digest, pack, scores_arrays, state_of, unpack
from backends.team import Abandoned, Apart, Team

Answer = tuple[Mapping[str, Any], Mapping[str, np.ndarray[Any, Any]]]


class Share(NamedTuple):
    """Of a step, for one process."""

    micro: list[Batch]
    weight: float  # of the whole step
    tokens: int  # supervised, of the whole step
    mine: int  # supervised, of this share


def follow(session: Session, team: Team, share_of: Callable[[Mapping[str, Any]], Share]) -> None:
    """Until the first process says that it is the end. share_of: from what the first process says of a step.

    Raises Lost where that process is gone, and what the session raises but for lack of memory and wrong tokens.
    """
    session.team = team
    while True:
        order, arrays = unpack(team.group.broadcast(None))
        if order["do"] == "end":
            return
        if order["do"] == "steps":
            _make_steps(session, team, order, share_of)
            continue
        team.group.gather(pack(*_answer(session, team, order, arrays)))


def _make_steps(
    session: Session, team: Team, cut: Mapping[str, Any], share_of: Callable[[Mapping[str, Any]], Share]
) -> None:
    """One after the other, until the first process says that it was the last, or that one was none."""
    while True:
        share = share_of(cut)
        team.whole(cut["step"], share.weight, share.tokens, share.mine)
        try:
            session.step(share.micro, 0.0)  # the rate comes with the sum
        except OutOfMemory:
            if team.summed and not team.lacking:  # the others have made this step
                raise
            team.say_lack()
            return
        except (NonFinite, Abandoned, Apart):  # the first process has it too, and says what comes next
            return
        if team.left:
            return
        cut = {**cut, "step": cut["step"] + 1}


def _answer(session: Session, team: Team, order: Mapping[str, Any], arrays: Any) -> Answer:
    try:
        return _work(session, team, order, arrays)
    except OutOfMemory as error:
        return {"lacks": str(error)}, {}
    except ValueError as error:
        return {"wrong": str(error)}, {}


def _work(session: Session, team: Team, order: Mapping[str, Any], arrays: Any) -> Answer:
    rank = team.group.rank
    if order["do"] == "state":
        mark = digest(session.get_state()).hex()
        session.set_state(state_of(order["step"], arrays))
        return {"mark": mark}, {}
    if order["do"] == "score":
        if rank >= len(order["batches"]):
            return {}, {}
        return {}, scores_arrays(session.score(batch_of(order["batches"][rank], arrays, rank)))
    if rank >= len(order["prompts"]):
        return {}, {}
    written = session.generate(order["prompts"][rank], order["most"], order["stop"], *order["drawn"][rank])
    return {"tokens": written}, {}
