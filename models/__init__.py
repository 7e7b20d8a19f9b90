"""The networks of the paper and a small one for a CPU, as Flax NNX modules.

`create` builds one by name, `names` and `table` list them. Every network is a
`Network`: images in, float32 logits out. `decay_mask` and `layer_labels` say which
parameters get weight decay and which ones form a layer.
"""

from models.alexnet import AlexNet
from models.cifarnet import CifarNet
from models.inception import SmallInception
from models.layers import local_response_normalization
from models.mlp import MLP
from models.network import Network
from models.parameters import decay_mask, layer_labels, parameter_count
from models.preact_resnet import PreActResNet18
from models.registry import Row, create, names, table
from models.resnet50 import ResNet50, load_pretrained
from models.resnet_small import ResNetSmall

__all__ = [
    "MLP",
    "AlexNet",
    "CifarNet",
    "Network",
    "PreActResNet18",
    "ResNet50",
    "ResNetSmall",
    "Row",
    "SmallInception",
    "create",
    "decay_mask",
    "layer_labels",
    "load_pretrained",
    "local_response_normalization",
    "names",
    "parameter_count",
    "table",
]
