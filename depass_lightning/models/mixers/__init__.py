"""Linear mixers in attention's place, by the kind that a declaration names."""

from depass_lightning.models.mixers.base import Mixer
from depass_lightning.models.mixers.differential_attention import DifferentialAttention
from depass_lightning.models.mixers.gated_delta import GatedDelta
from depass_lightning.models.mixers.gated_recurrence import GatedRecurrence
from depass_lightning.models.mixers.lightning_attention import LightningAttention
from depass_lightning.models.mixers.selective_scan import SelectiveScan
from depass_lightning.models.mixers.short_convolution import ShortConvolution
from depass_lightning.models.mixers.side_by_side import SideBySide
from depass_lightning.models.mixers.state_space import StateSpace

MIXERS: dict[str, type[Mixer]] = {
    mixer.kind: mixer
    for mixer in (
        DifferentialAttention,
        GatedDelta,
        GatedRecurrence,
        LightningAttention,
        SelectiveScan,
        ShortConvolution,
        SideBySide,
        StateSpace,
    )
}
