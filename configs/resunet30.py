"""ResUNet30 as published: `resunet30.py:condition=soft|embedding,data=balanced|full`.

The four recipes of bytedance/uss (32 kHz mono, 2 sources, L1 on the waveform, AdamW with amsgrad,
batch 16 per device in the original). The paper reports 5.57 dB SDRi on AudioSet with condition=soft
and data=full, after 1 M steps. `query=htsat` and `sed=htsat` use HTS-AT instead of PANNs' nets for
conditions and for anchors, `query=yamnet` and `sed=yamnet` the YAMNet in the package.

    uss-jax train --config configs/resunet30.py:condition=soft,data=full --workdir runs/soft \
        --config.data.records=/data/audioset/1.0.0 --config.sed_bundle=bundles/sed \
        --config.query_bundle=bundles/cnn14
"""

from ml_collections import ConfigDict

SPLITS = {"balanced": "balanced_train", "full": "full_train"}
CHOICES = {
    "condition": ("soft", "embedding"),
    "data": ("full", "balanced"),
    "query": ("cnn14", "htsat", "yamnet"),
    "sed": ("cnn14", "htsat", "yamnet"),
}


def get_config(argument: str = "condition=soft,data=full") -> ConfigDict:
    """Returns the config; `argument` chooses the condition, the data and the frozen nets."""
    chosen = {name: values[0] for name, values in CHOICES.items()}
    for part in argument.split(","):
        name, _, value = part.partition("=")
        if value not in CHOICES.get(name, ()):
            expected = ",".join(f"{name}={'|'.join(values)}" for name, values in CHOICES.items())
            raise ValueError(f"{argument!r}: expected {expected}")
        chosen[name] = value

    config = ConfigDict()
    config.seed = 1234
    config.sample_rate = 32000
    config.segment_seconds = 2.0
    config.total_steps = 1_000_000
    # Items per step over all devices, whatever their number.
    config.global_batch = 16

    config.data = ConfigDict()
    config.data.records = ""  # folder written by `uss-jax prepare` or indexed by `uss-jax index`
    config.data.split = SPLITS[chosen["data"]]
    config.data.order = "balanced"  # or "uniform" over clips
    config.data.share = 1.0  # fraction of the clips used; larger fractions contain smaller ones
    config.data.clip_seconds = 10.0
    # Reader threads, one batch each. One reads 16 PCM clips from the page cache in 5 ms; four hide
    # a bucket's latency of 40 ms; more do no harm. Decoding FLAC takes 4 ms of a core per clip,
    # 1 ms per anchor.
    config.data.threads = 4
    config.data.workers = 0  # reader processes, for when threads are not enough
    config.data.class_weights = ConfigDict()  # class name -> draws per round; default 1
    config.data.max_corrupt = 0  # damaged records to report and replace before failing
    config.data.verify = "whole"  # "always": check the whole clip even if only its anchor is read

    # Frozen nets: bundles or workdirs of taggers, and the architecture of each.
    config.sed_bundle = "yamnet" if chosen["sed"] == "yamnet" else ""
    config.sed_net = chosen["sed"]
    config.query_bundle = "yamnet" if chosen["query"] == "yamnet" else ""
    config.query_net = chosen["query"]

    config.anchors = ConfigDict()
    config.anchors.source = "device"  # detect in the training step; or "table" or "random"
    config.anchors.min_dbfs = -60.0  # skip quieter segments
    config.anchors.rule = "uss"  # or "htsat" with sed=htsat; only with source "device"
    # With source "table": the file that `uss-jax mine` wrote, and how to draw from it.
    config.anchors.table = ""
    config.anchors.min_score = 0.0  # skip labels whose best anchor scores less
    config.anchors.top_k = 1  # anchors of a label to draw from, in proportion to their scores
    config.anchors.jitter_samples = 0  # maximum shift of an anchor's start, either way

    config.speed = None  # or arguments of training/augment.py's change_speed, for small data sets

    config.mixing = ConfigDict()
    config.mixing.sources = 2
    config.mixing.group_size = 16  # item i is mixed with the next items of its group
    config.mixing.match_energy = True
    config.mixing.gain_db = 0.0  # then offset levels between sounds at random, within +- this
    # "conflict_free" reorders the items of a group so that no mixture holds two sounds of the same
    # class or of nested classes.
    config.mixing.order = "reference"
    # Let every `sources` items share one mixture; each of them is the target once.
    config.mixing.all_targets = False
    # Probability that an item queries a class absent from its mixture; its target is then silence.
    config.mixing.silent_share = 0.0
    # Largest random pan: 0 leaves sounds in the middle, in mono; 1 reaches one channel only. If it
    # is above 0, it needs separator.audio_channels=2.
    config.mixing.pan = 0.0

    config.query = ConfigDict()
    config.query.kind = chosen["condition"]
    config.query.finetune = False
    config.query.adaptor_width = 0  # 0 for no adaptor
    config.query.adaptor_hidden = 2048
    config.query.shortcut = False
    # Share of items asked with their class's probability alone, as `--classes` without means asks.
    config.query.one_class_share = 0.0
    config.query.dropout = 0.0  # on the tagging net's output, in training
    # The folder that `uss-jax mine --query` wrote beside anchors.table; "": the step computes
    # conditions.
    config.query.table = ""
    # Shares of the items asked with the condition of the target itself ("own", as published), with
    # that of another recording of its class ("other"), with its class's mean over the training set
    # ("mean"), with "other" and "own" in random proportion ("mix"), or with its class's probability
    # in the mixture ("masked"). "other", "mean" and "mix" need `table`.
    config.query.source = ConfigDict(dict(own=1.0, other=0.0, mean=0.0, mix=0.0, masked=0.0))
    config.query.groups = ""  # label file with a column `group`: "other" is of another group
    # For conditions of texts: the folder of all-MiniLM-L6-v2, by which items are asked with their
    # class's name in several phrases; "": with the bare name, whose vector is in the package.
    config.query.text_encoder = ""
    # The folder that `uss-jax captions` wrote: clips that have one are asked with their caption.
    config.query.captions = ""
    config.query.text_share = 0.5  # share of items asked with a text, where sounds can ask too

    config.separator = ConfigDict()
    config.separator.n_fft = 2048
    config.separator.hop_samples = 320
    config.separator.channels = (32, 64, 128, 256, 384, 384)
    config.separator.blocks_per_level = 1
    config.separator.audio_channels = 1
    config.separator.condition_norm = 0.0  # norm to which conditions are scaled; 0: as they are
    config.separator.film_gain = False
    config.separator.dtype = "float32"  # or "bfloat16" inside the U-Net

    config.loss = "l1_wav"  # or "l1_wav_l1_sp", "si_sdr", "snr_threshold"
    config.weight_decay = 0.0
    config.clip_norm = 0.0  # maximum global norm of the gradient; 0 for no limit
    config.ema_decay = 0.0  # of the parameters' moving average, which is then used; 0: none
    # An update is skipped if the loss or gradient is NaN or infinite, or the gradient norm exceeds
    # `max_norm_ratio` times its running median (0 for no limit). `max_skipped_steps` skips in a row
    # stop the run.
    config.max_norm_ratio = 100.0
    config.max_skipped_steps = 10
    config.schedule = ConfigDict()
    config.schedule.name = "constant_warm_up"
    config.schedule.learning_rate = 1e-3
    config.schedule.warm_up_steps = 10_000

    # Execution of a step.
    config.accumulate = 1  # sequential parts of the batch, if it does not fit in memory
    # Batch norm over the "global" batch, "replica" (a device's part), or a number of items ("16").
    config.batch_norm = "global"
    # Precision of float32 products and convolutions in training; the detector's is always
    # "highest". NVIDIA GPUs: "default" and "high" are TF32 (PyTorch's default for convolutions),
    # "highest" is float32. TPUs: 1, 3 and 6 bfloat16 passes. By its maker's figures an H100
    # multiplies 7 times as fast at "default" as at "highest", a TPU 6 times; TF32 changes the
    # published net's waveform by 1.6e-3 of its norm. On a CPU, and for bfloat16 arrays, all are the
    # same.
    config.precision = "default"
    config.remat = False  # True: recompute residual blocks in the backward pass, to save memory
    # (regular expression, "fsdp" or "replicate") for names such as params/separator/.../kernel.
    # fsdp shards an array, its moments and its average over the devices. See devices/mesh.py.
    config.sharding = ()

    config.log_every_steps = 100
    config.checkpoint_every_steps = 10_000
    config.keep_checkpoints = 3  # number of newest checkpoints
    config.keep_best = 1  # number of the best in evaluation, in addition
    # By SDRi with the condition of the clean source ("sdri"), or with that of a query in
    # eval.queries ("average_sdri"), or the same with SI-SDRi ("si_sdri").
    config.best_by = "sdri"
    # If the newest checkpoint is damaged: "set_aside" to resume from the one before, or "stop".
    config.damaged_checkpoint = "set_aside"
    # Bundle, workdir or converted checkpoint whose parameters a new run starts from; "" for none.
    config.init_from = ""
    config.init_partly = False  # take what has the same name and shape, else all must

    config.eval = ConfigDict()
    config.eval.pairs = ""  # folder written by `uss-jax make-pairs`; no evaluation if empty
    config.eval.every_steps = 10_000
    # What pairs are asked with besides their sources; each costs a separation. "average" of the
    # class's clips in data.split (of all, whatever data.share), the "mean" of its mined conditions,
    # "class" alone, its name as "text", another pair's source ("shuffled"), a few clips of the
    # split ("recordings_1", ...).
    config.eval.queries = ("average", "class")

    config.profile = ConfigDict()
    config.profile.steps = ()  # (first, last) steps to profile; the trace goes to the workdir
    return config
