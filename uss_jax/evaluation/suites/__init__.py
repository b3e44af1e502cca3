"""The suites of `uss-jax evaluate`: a row here and a module of the same name each.

`mixing`, `whole` and `speech` hold what several suites share.
"""

from uss_jax.evaluation.suite import Option, Published, Suite

_TEXTS = (
    Option(
        "--text-encoder",
        "also query in words, the names of the classes, by this sentence encoder",
        "path",
        metavar="DIR",
    ),
    Option(
        "--texts",
        'JSON file of other words, as in {"Dog": ["a dog barks", "barking"]}',
        "path",
        metavar="FILE",
        only_with="--text-encoder",
    ),
)

_ROWS = (
    Suite(
        "pairs",
        "separation of pairs with several queries; SDR and SI-SDR, with trivial baselines",
        data="folder of the pairs",
        options=(
            Option(
                "--train-records",
                "records; the condition of each class is averaged over their anchors",
                "path",
                metavar="R",
            ),
            Option(
                "--split",
                "split of --train-records; default: train",
                only_with="--train-records",
            ),
            Option(
                "--train-pairs",
                "instead, folder of pairs; average over their sources, as published",
                "path",
                metavar="DIR",
            ),
            Option(
                "--oracle-only",
                "separate each pair only once, with the condition of its clean source",
                "switch",
            ),
            Option(
                "--recordings",
                "also query with the mean condition of K training recordings of the class, drawn "
                "for each pair; several K separated by commas, such as 1,4,16",
                "positives",
                (),
                metavar="K",
            ),
            *_TEXTS,
            Option("--bank", "write the averaged conditions", "path", metavar="FILE.npz"),
            Option(
                "--examples",
                "write audio and spectrograms of N pairs, evenly spaced by rank of their SDRi",
                "natural",
                0,
                metavar="N",
            ),
            Option(
                "--out-dir",
                "folder for the examples",
                "path",
                metavar="DIR",
                only_with="--examples",
            ),
        ),
        example="uss-jax evaluate pairs --model runs/separator --data pairs --out results.json \\\n"
        "      --train-records data/my_sounds/1.0.0 --bank classes.npz --examples 3 --out-dir out",
        published=Published(
            "AudioSet, 527 classes",
            "sdri",
            "SDRi, dB",
            5.57,
            7.74,
            classes=527,
            options="--train-pairs TRAIN_PAIRS",
            data="PAIRS",
        ),
    ),
    Suite(
        "tagging",
        "mean average precision and ROC AUC of a model's tagging net and detector",
        data="directory of the records",
        options=(Option("--split", "split of the records; default: test", default="test"),),
    ),
    Suite(
        "planted",
        "share of mined anchors that contain a planted sound, compared with random anchors",
        data="directory of the records",
        options=(
            Option("--split", "split of the records; default: test", default="test"),
            Option("--clips", "clips per background; default: 200", "positive", 200, metavar="N"),
            Option("--seed", "random seed; default: 0", "natural", 0),
        ),
        example="uss-jax evaluate planted --model runs/tagger --data data/my_sounds/1.0.0",
        detector_only=True,
    ),
    Suite(
        "fsdkaggle2018",
        "mixtures of FSDKaggle2018, 41 classes; SDR and SI-SDR",
        options=_TEXTS,
        published=Published("FSDKaggle2018, 41 classes", "sdri", "SDRi, dB", 10.57, classes=41),
    ),
    Suite(
        "fsd50k",
        "mixtures of FSD50K, 200 classes; SDR and SI-SDR",
        options=(
            Option(
                "--labels",
                "query the first label of a recording, as published (default), or each of its "
                "labels",
                default="first",
                choices=("first", "all"),
            ),
            *_TEXTS,
        ),
        published=Published("FSD50K, 200 classes", "sdri", "SDRi, dB", None, classes=200),
    ),
    Suite(
        "musdb18",
        "songs of MUSDB18-HQ, 4 stems; SDR as museval computes it",
        options=(
            Option(
                "--legacy",
                "also compute the published metrics: one channel at the model's sampling rate, "
                "blocks of 2 s without overlap, reference and estimate swapped",
                "switch",
            ),
        ),
        published=Published(
            "MUSDB18, 4 stems", "legacy_sdri", "SDRi, dB", 8.12, options="--legacy"
        ),
    ),
    Suite(
        "slakh2100",
        "windows of Slakh2100's songs; SDR and SI-SDR",
        options=(
            Option(
                "--by",
                "class of a sound: plugin name, as published (default), or General MIDI instrument",
                default="plugin",
                choices=("plugin", "instrument"),
            ),
            *_TEXTS,
        ),
        published=Published("Slakh2100", "sdri", "SDRi, dB", 7.28),
    ),
    Suite(
        "voicebank_demand",
        "sentences of Voicebank-Demand; PESQ, SSNR, CSIG, CBAK, COVL",
        options=(
            Option(
                "--blocks",
                "windows with context (default), or blocks of 2 s without overlap, as published",
                default="windows",
                choices=("windows", "reference"),
            ),
        ),
        published=Published(
            "Voicebank-Demand", "ssnr", "SSNR, dB", 9.00, options="--blocks reference"
        ),
    ),
)
SUITES = {suite.name: suite for suite in _ROWS}
