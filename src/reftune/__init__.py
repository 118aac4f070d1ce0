"""Representation finetuning (ReFT): adapt a frozen Hugging Face model by editing a few hidden states."""

from .api import get_reft_model as get_reft_model
from .checkpoint import describe as describe
from .checkpoint import install as _install
from .checkpoint import load_pyreft as load_pyreft
from .checkpoint import truncate as truncate
from .composition import Composition as Composition
from .composition import ConflictReport as ConflictReport
from .composition import adapters as adapters
from .composition import bake as bake
from .composition import compose as compose
from .composition import conflicts as conflicts
from .composition import current as current
from .composition import load_composed as load_composed
from .composition import load_composition as load_composition
from .composition import save_composition as save_composition
from .composition import strength as strength
from .explaining import Explanation as Explanation
from .explaining import explain as explain
from .interventions import ConsreftIntervention as ConsreftIntervention
from .interventions import DireftIntervention as DireftIntervention
from .interventions import Intervention as Intervention
from .interventions import LobireftIntervention as LobireftIntervention
from .interventions import LoreftIntervention as LoreftIntervention
from .interventions import NodireftIntervention as NodireftIntervention
from .interventions import NoreftIntervention as NoreftIntervention
from .interventions import PostBlockIntervention as PostBlockIntervention
from .interventions import RedIntervention as RedIntervention
from .interventions import ReftR1Intervention as ReftR1Intervention
from .interventions import StackIntervention as StackIntervention
from .interventions import SubspaceIntervention as SubspaceIntervention
from .interventions import register_intervention as register_intervention
from .models import load_adapted as load_adapted
from .models import load_model as load_model
from .operations import Cost as Cost
from .operations import cost as cost
from .tuner import ReftConfig as ReftConfig
from .tuner import ReftModel as ReftModel
from .tuner.apart import load_on_lora as load_on_lora
from .tuner.apart import save_lora as save_lora
from .tuner.apart import save_reft as save_reft
from .tuner.starting import initialize_reft_weights as initialize_reft_weights

__version__ = "0.1.0"
_install()  # PeftModel.save_pretrained of a ReFT adapter becomes atomic, with our card
