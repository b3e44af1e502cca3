"""Computes the metrics of a model on a data set; prints a table and writes a JSON file.

pairs     separation: SDR and SI-SDR of pairs in the layout of `uss-jax make-pairs`
tagging   mean average precision and ROC AUC on labelled records
planted   whether anchors contain sounds planted at known positions

fsdkaggle2018, fsd50k, slakh2100, musdb18 and voicebank_demand take the folder of a data set as
unpacked from its publisher's archives, check that it is complete, and score it as published.
"""

import argparse

from uss_jax.cli.arguments import add_precision, natural, path, positive, refuse_idle

_HELP = {
    "pairs": "separation of pairs with several queries; SDR and SI-SDR, with trivial baselines",
    "tagging": "mean average precision and ROC AUC of a model's tagging net and detector",
    "planted": "share of mined anchors that contain a planted sound, compared with random anchors",
    "fsdkaggle2018": "mixtures of FSDKaggle2018, 41 classes; SDR and SI-SDR",
    "fsd50k": "mixtures of FSD50K, 200 classes; SDR and SI-SDR",
    "slakh2100": "windows of Slakh2100's songs; SDR and SI-SDR",
    "musdb18": "songs of MUSDB18-HQ, 4 stems; SDR as museval computes it",
    "voicebank_demand": "sentences of Voicebank-Demand; PESQ, SSNR, CSIG, CBAK, COVL",
}
_DATA = {
    "pairs": "folder of the pairs",
    "tagging": "directory of the records",
    "planted": "directory of the records",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    made = {}
    for name, text in _HELP.items():
        made[name] = suite = suites.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        suite.add_argument(
            "--model", type=path, required=True, metavar="B", help="bundle or workdir"
        )
        data = _DATA.get(name, "folder of the data set")
        suite.add_argument("--data", type=path, required=True, metavar="DIR", help=data)
        suite.add_argument(
            "--out",
            type=path,
            default="results.json",
            metavar="FILE",
            help="JSON file to write; default: results.json",
        )
        add_precision(suite)
    _add_pairs(made["pairs"])
    made["tagging"].add_argument(
        "--split", default="test", help="split of the records; default: test"
    )
    _add_planted(made["planted"])
    made["fsd50k"].add_argument(
        "--labels",
        choices=("first", "all"),
        default="first",
        help="query the first label of a recording, as published (default), or each of its labels",
    )
    made["slakh2100"].add_argument(
        "--by",
        choices=("plugin", "instrument"),
        default="plugin",
        help="class of a sound: plugin name, as published (default), or General MIDI instrument",
    )
    made["musdb18"].add_argument(
        "--legacy",
        action="store_true",
        help="also compute the published metrics: one channel at the model's sampling rate, blocks "
        "of 2 s without overlap, reference and estimate swapped",
    )
    made["voicebank_demand"].add_argument(
        "--blocks",
        choices=("windows", "reference"),
        default="windows",
        help="windows with context (default), or blocks of 2 s without overlap, as published",
    )
    parser.epilog = (
        "example:\n"
        "  uss-jax evaluate pairs --model runs/separator --data pairs --out results.json\n\n"
        "`uss-jax evaluate SUITE --help` shows the options of a suite."
    )


def _add_pairs(suite: argparse.ArgumentParser) -> None:
    suite.add_argument(
        "--train-records",
        type=path,
        metavar="R",
        help="records; the condition of each class is averaged over their anchors",
    )
    suite.add_argument("--split", help="split of --train-records; default: train")
    suite.add_argument(
        "--train-pairs",
        type=path,
        metavar="DIR",
        help="instead, folder of pairs; average over their sources, as published",
    )
    suite.add_argument(
        "--oracle-only",
        action="store_true",
        help="separate each pair only once, with the condition of its clean source",
    )
    suite.add_argument(
        "--bank", type=path, metavar="FILE.npz", help="write the averaged conditions"
    )
    suite.add_argument(
        "--examples",
        type=natural,
        default=0,
        metavar="N",
        help="write audio and spectrograms of N pairs, evenly spaced by rank of their SDRi",
    )
    suite.add_argument("--out-dir", type=path, metavar="DIR", help="folder for the examples")
    suite.epilog = (
        "example:\n"
        "  uss-jax evaluate pairs --model runs/separator --data pairs --out results.json \\\n"
        "      --train-records data/my_sounds/1.0.0 --bank classes.npz --examples 3 --out-dir out"
    )


def _add_planted(suite: argparse.ArgumentParser) -> None:
    suite.add_argument("--split", default="test", help="split of the records; default: test")
    suite.add_argument(
        "--clips",
        type=positive,
        default=200,
        metavar="N",
        help="clips per background; default: 200",
    )
    suite.add_argument("--seed", type=natural, default=0, help="random seed; default: 0")
    suite.epilog = (
        "example:\n  uss-jax evaluate planted --model runs/tagger --data data/my_sounds/1.0.0"
    )


def run(args: argparse.Namespace) -> None:
    from uss_jax.devices.mesh import one_device_per_core
    from uss_jax.evaluation.run import evaluate

    one_device_per_core()
    if args.suite == "pairs":
        if not args.train_records:
            refuse_idle(args, ("split",), "without --train-records")
        if not args.examples:
            refuse_idle(args, ("out_dir",), "without --examples")
        args.split = args.split or "train"
    common = ("suite", "model", "data", "out", "run", "config_overrides")
    options = {key: value for key, value in vars(args).items() if key not in common}
    print(evaluate(args.suite, args.model, args.data, args.out, **options))
    print(f"\n{args.out}: all metrics")
