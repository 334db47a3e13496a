"""Measuring each sample's loss where it first appears: at the first squared or absolute error behind the denoiser."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_iet.callbacks.seams.denoiser_call import CallError, DenoiserCall, Verdict
from lightning_iet.callbacks.seams.error_operations import ErrorOperation
from lightning_iet.callbacks.seams.error_watch import owners_behind
from lightning_iet.callbacks.seams.row_locality import Layout, layouts, row_maps

__all__ = ["LossCapture"]

_Key: TypeAlias = tuple[int, ...]


@dataclass
class _Part:
    """Losses of some or all samples, and for each call the loss of each row of it."""

    losses: Tensor
    maps: list[Tensor]


class LossCapture:
    """Turns errors that appear behind a denoiser's output into one loss per sample.

    Which errors count, and how samples lie in them, is settled with the first batch: the first one through which a
    gradient reaches the output, and further ones until every row of the output has a loss. For every size of batch that
    is met for the first time, :func:`~lightning_iet.callbacks.seams.row_locality.row_maps` tests that each row of the
    output has a part in one loss only; later batches of that size are trusted, and wait for nothing.

    Attributes:
        pending: The calls whose losses are being measured.
        failure: Why they cannot be; raised when the step comes to its backward pass.
        description: How they are, once it is settled.
        seen: Number of errors seen so far.
        probing: Whether gradients are being taken for the test: they are none of the user's.
    """

    def __init__(self) -> None:
        self.pending: list[DenoiserCall] = []
        self.failure: CallError | None = None
        self.description = ""
        self.seen = 0
        self.probing = False
        self._layouts: dict[int, Layout] = {}  # of the errors that count, by their place among all
        self._maps: dict[_Key, list[Tensor]] = {}
        self._pairings: dict[_Key, _Pairing] = {}
        self._parts: list[_Part] = []
        self._place = 0

    def begin(self, calls: list[DenoiserCall]) -> None:
        """Measure the losses of these calls, from the next error on."""
        self.pending, self._parts, self._place = calls, [], 0

    def notice(self, error: ErrorOperation) -> Verdict | None:
        """Look at an error; return the verdict to be when it completes the losses of the calls behind it."""
        calls = self._calls_behind(error)
        if not calls or self.failure is not None:
            return None
        place, self._place = self._place, self._place + 1
        self.seen += 1
        if self.description and place not in self._layouts:
            return None
        try:
            part = self._measure(error, calls, place)
            if part is None:
                return None
            if not self._adds(part):
                del self._layouts[place]
                return None
            self._parts.append(part)
            return self._complete(calls, error.name)
        except CallError as failure:
            self.failure = failure
            return None

    def incomplete(self) -> CallError | None:
        """What to say of a step that ends before every row has a loss."""
        if not self._parts:
            return None
        call = self.pending[-1]
        num_rows = int((self._join(0, call, sum(len(part.losses) for part in self._parts)) >= 0).sum())
        return CallError(f"only {num_rows} of its {call.batch_size} rows have a loss")

    def _adds(self, part: _Part) -> bool:
        """Whether a part measures rows that none has measured yet; of no interest once the parts are settled."""
        if self.description or not self._parts:
            return True
        pairs = zip(part.maps, *(earlier.maps for earlier in self._parts), strict=True)
        return any(((new >= 0) & (torch.stack(known).amax(0) < 0)).any() for new, *known in pairs)

    def _calls_behind(self, error: ErrorOperation) -> list[DenoiserCall]:
        owners = {node: number for number, call in enumerate(self.pending) for node in call.nodes}
        found: set[int] = set()
        for operand in error.operands:
            found |= owners_behind(operand, owners, after_difference=not error.is_difference)
        return [self.pending[number] for number in sorted(found)]

    def _measure(self, error: ErrorOperation, calls: list[DenoiserCall], place: int) -> _Part | None:
        """Lay the samples out; None if no gradient passes."""
        size = calls[0].batch_size
        layout = self._layouts.get(place)
        if layout is not None:
            with torch.no_grad():
                rows = self._rows(error, layout, size)
            key = (place, len(rows), *(call.batch_size for call in calls))
            if key in self._maps:
                return _Part(_mean(rows), self._maps[key])
        elements = error.elements()  # with a graph, also where the step itself reduced it at once
        for candidate in layouts(elements, size) if layout is None else [layout]:
            rows = candidate.rows(elements, size)
            maps = self._probe(rows, calls)
            if maps is not None:
                if layout is None and all((row_map < 0).all() for row_map in maps):
                    _refuse_broken(elements, error.name)
                    return None
                self._layouts[place] = candidate
                self._maps[(place, len(rows), *(call.batch_size for call in calls))] = maps
                return _Part(_mean(rows.detach()), maps)
        raise CallError(
            f"the errors behind it, `{error.name}` of shape {tuple(elements.shape)}, mix its {size} rows: the gradient"
            " of one sample's loss reaches another's row"
        )

    def _rows(self, error: ErrorOperation, layout: Layout, size: int) -> Tensor:
        elements = error.elements().detach()
        if not layout.fits(elements, size):
            raise CallError(
                f"the errors behind it, `{error.name}` of shape {tuple(elements.shape)}, do not fit its {size} rows any"
                " more"
            )
        return layout.rows(elements, size)

    def _probe(self, rows: Tensor, calls: list[DenoiserCall]) -> list[Tensor] | None:
        self.probing = True
        try:
            return row_maps(rows, [call.outputs for call in calls])
        except RuntimeError as error:  # a graph that may be passed through only once, say
            reason = str(error).partition("\n")[0]
            raise CallError(f"the graph of its losses cannot be tested ({reason})") from error
        finally:
            self.probing = False

    def _complete(self, calls: list[DenoiserCall], name: str) -> Verdict | None:
        """Put the parts together once every row has a loss."""
        if self.description and len(self._parts) < len(self._layouts):
            return None
        losses = torch.cat([part.losses for part in self._parts])
        key = (len(losses), *(call.batch_size for call in calls))
        if key not in self._pairings:
            maps = [self._join(number, call, len(losses)) for number, call in enumerate(calls)]
            if any((row_map < 0).any() for row_map in maps):
                return None
            self._pairings[key] = _pair(maps, calls, losses)
        self.description = self.description or f"the first `{name}` behind its output, averaged per sample"
        pairing = self._pairings[key]
        timesteps = torch.cat([call.timesteps for call in calls])
        verdict = Verdict(losses, timesteps if pairing.first_rows is None else timesteps[pairing.first_rows])
        for call, row_map in zip(calls, pairing.row_maps, strict=True):
            call.row_map, call.verdict = row_map, verdict
        self.begin([call for call in self.pending if call.verdict is None])
        return verdict

    def _join(self, number: int, call: DenoiserCall, num_losses: int) -> Tensor:
        """For each row of a call its loss among those of all parts, (B,); -1 where none is known."""
        joined = torch.full((call.batch_size,), -1)
        offset = 0
        for part in self._parts:
            row_map = part.maps[number]
            joined = torch.where((joined < 0) & (row_map >= 0), row_map + offset, joined)
            offset += len(part.losses)
        if len(self._parts) == 1 and num_losses == call.batch_size:
            # A row that no gradient reaches (a sample that is masked out, say): its place says which it is.
            joined = torch.where(joined < 0, torch.arange(call.batch_size), joined)
        return joined


@dataclass
class _Pairing:
    """Which rows belong to which loss; None where they are simply the same."""

    row_maps: list[Tensor | None]
    first_rows: Tensor | None


def _pair(maps: list[Tensor], calls: list[DenoiserCall], losses: Tensor) -> _Pairing:
    """Check that the rows of one loss have one timestep, and move the maps to the device."""
    timesteps = torch.cat([call.timesteps for call in calls])
    owners = torch.cat(maps)
    first_rows = torch.full((len(losses),), -1)
    first_rows[owners.flip(0)] = torch.arange(len(owners)).flip(0)  # the first of several is written last
    if (first_rows < 0).any():
        raise CallError(f"of the {len(losses)} losses behind it some belong to none of its rows")
    if not torch.equal(timesteps, timesteps[first_rows[owners]]):
        raise CallError("rows at different timesteps share one loss, as in consistency training, which AGC is not for")
    same = [torch.equal(row_map, torch.arange(len(losses))) for row_map in maps]
    return _Pairing(
        row_maps=[None if plain else row_map.to(losses.device) for plain, row_map in zip(same, maps, strict=True)],
        first_rows=None if len(calls) == 1 and same[0] else first_rows.to(timesteps.device),
    )


def _refuse_broken(elements: Tensor, name: str) -> None:
    if not elements.detach().isfinite().any():
        raise CallError(
            f"its losses (`{name}`) are NaN or infinite before anything was learnt: look at data and weights"
        )


def _mean(rows: Tensor) -> Tensor:
    """Mean of each row, (n,), at least in float32."""
    return rows.mean(1, dtype=torch.promote_types(rows.dtype, torch.float32))
