"""ReFT as a PEFT method: config, model, layer and registration, thin over interventions, positions and sites."""

from . import registration, reloading
from .config import ReftConfig as ReftConfig
from .counting import TrainableParameters as TrainableParameters
from .layer import ReftLayer as ReftLayer
from .model import ReftModel as ReftModel

registration.register(ReftConfig, ReftModel)
registration.accept_several()
registration.spare_tokens()
reloading.check_reloads()
