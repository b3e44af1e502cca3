"""bytedance/uss 0.0.4 loads a checkpoint as its users do; run by `test_original_program.py`.

Arguments: the checkpoint, the checkpoint it must equal, and a CSV file of the labels. Prints the
versions and the number of tensors that are equal, bit by bit, as JSON.
"""

import json
import pathlib
import sys

import lightning
import torch
import uss.utils

checkpoint, wanted, labels = map(pathlib.Path, sys.argv[1:])
# The addresses it would fetch its labels from are gone.
uss.utils.get_path = lambda meta: labels

from uss.data.anchor_segment_detectors import AnchorSegmentDetector  # noqa: E402
from uss.models.pl_modules import LitSeparation  # noqa: E402
from uss.models.query_nets import Cnn14_Wrapper  # noqa: E402
from uss.models.resunet import ResUNet30  # noqa: E402
from uss.utils import load_pretrained_panns  # noqa: E402

wanted = torch.load(wanted, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
width = wanted["ss_model.film.encoder_block1->conv_block1->beta1.weight"].shape[1]
model = LitSeparation.load_from_checkpoint(
    checkpoint_path=str(checkpoint),
    map_location="cpu",
    strict=True,
    ss_model=ResUNet30(1, 1, width),
    anchor_segment_detector=AnchorSegmentDetector(
        sed_model=load_pretrained_panns("Cnn14_DecisionLevelMax", "", True),
        clip_seconds=10.0,
        segment_seconds=2.0,
        frames_per_second=100,
        sample_rate=32000,
        detect_mode="max_area",
    ),
    anchor_segment_mixer=None,
    query_net=Cnn14_Wrapper("at_soft", "", True),
    loss_function=None,
    optimizer_type=None,
    learning_rate=None,
    lr_lambda_func=None,
)
loaded = model.state_dict()
equal = [name for name in wanted if torch.equal(loaded[name], wanted[name])]
versions = {"lightning": lightning.__version__, "torch": torch.__version__}
print(json.dumps({**versions, "tensors": len(loaded), "equal": len(equal)}))
