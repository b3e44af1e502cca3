"""The evaluation of bytedance/uss 0.0.4, run by `evaluation.py` with a Python that has it.

Arguments: a folder with weights.ckpt, labels.csv and pairs/. For every line it reads it evaluates
the pairs and prints the seconds it took and their SDRs, as JSON.
"""

import json
import pathlib
import sys
import time
import types

import torch
import uss.utils

place = pathlib.Path(sys.argv[1])
# The addresses it would fetch its labels from are gone.
uss.utils.get_path = lambda meta: place / "labels.csv"

from uss.evaluate import AudioSetEvaluator  # noqa: E402
from uss.models.query_nets import Cnn14_Wrapper  # noqa: E402
from uss.models.resunet import ResUNet30  # noqa: E402


def load(net: torch.nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> torch.nn.Module:
    """The net with what is stored under a prefix."""
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    net.load_state_dict(found)
    return net.eval()


tensors = torch.load(place / "weights.ckpt")["state_dict"]
model = types.SimpleNamespace(
    device="cpu",
    eval=lambda: None,
    query_net=load(Cnn14_Wrapper("at_soft", "", True), tensors, "query_net."),
    ss_model=load(ResUNet30(1, 1, 527), tensors, "ss_model."),
)
evaluate = AudioSetEvaluator(str(place / "pairs"), classes_num=1)
print(json.dumps("ready"), flush=True)
for _ in sys.stdin:
    began = time.perf_counter()
    found = evaluate(model)
    seconds = time.perf_counter() - began
    print(json.dumps([seconds, [float(sdr) for sdr in found["sdrs_dict"][0]]]), flush=True)
