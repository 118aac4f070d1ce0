"""ReFT as a PEFT method: config, model, layer and registration, thin over interventions, positions and sites."""

from . import registration, reloading
from .config import ReftConfig as ReftConfig
from .layer import ReftLayer as ReftLayer
from .model import ReftModel as ReftModel
from .model import TrainableParameters as TrainableParameters

registration.register(ReftConfig, ReftModel)
registration.accept_several()
reloading.check_reloads()
