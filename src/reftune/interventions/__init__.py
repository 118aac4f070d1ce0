"""The maths: modules h ↦ h + Δ(h), one idea a file. Knows torch alone."""

from .base import INTERVENTIONS as INTERVENTIONS
from .base import Intervention as Intervention
from .base import intervention_class as intervention_class
from .base import kind_of as kind_of
from .base import register_intervention as register_intervention
from .choice import Choice as Choice
from .complement import Taken as Taken
from .complement import taken_by as taken_by
from .lowrank import ConsreftIntervention as ConsreftIntervention
from .lowrank import DireftIntervention as DireftIntervention
from .lowrank import LobireftIntervention as LobireftIntervention
from .lowrank import LoreftIntervention as LoreftIntervention
from .lowrank import LowRankIntervention as LowRankIntervention
from .lowrank import NodireftIntervention as NodireftIntervention
from .lowrank import NoreftIntervention as NoreftIntervention
from .orthogonal import orthonormal_rows as orthonormal_rows
from .orthogonal import orthonormality_error as orthonormality_error
from .orthogonal import retract_ as retract_
from .other import PostBlockIntervention as PostBlockIntervention
from .other import RedIntervention as RedIntervention
from .other import ReftR1Intervention as ReftR1Intervention
from .retraction import retract_all as retract_all
from .stack import StackIntervention as StackIntervention
from .stack import check_stack as check_stack
from .subspaces import SubspaceIntervention as SubspaceIntervention
from .subspaces import check_subspaces as check_subspaces
