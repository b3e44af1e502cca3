"""ResUNet30 as published: `resunet30.py:condition=soft|embedding,data=balanced|full`.

The four recipes of bytedance/uss (32 kHz mono, 2 sources, L1 on the waveform, AdamW with amsgrad,
batch 16 on each device there). The paper reports 5.57 dB SDRi on AudioSet with condition=soft and
data=full, after 1 M steps. `query=htsat` and `sed=htsat` take HTS-AT instead of PANNs' nets for
conditions and for anchors.

    uss-jax train --config configs/resunet30.py:condition=soft,data=full --workdir runs/soft \
        --config.data.records=/data/audioset/1.0.0 --config.sed_bundle=bundles/sed \
        --config.query_bundle=bundles/cnn14
"""

from ml_collections import ConfigDict

SPLITS = {"balanced": "balanced_train", "full": "full_train"}
CHOICES = {
    "condition": ("soft", "embedding"),
    "data": ("full", "balanced"),
    "query": ("cnn14", "htsat"),
    "sed": ("cnn14", "htsat"),
}


def get_config(argument: str = "condition=soft,data=full") -> ConfigDict:
    """The config; `argument` chooses the condition, the data and the frozen nets."""
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
    # Items of a step on all devices together, whatever their number.
    config.global_batch = 16

    config.data = ConfigDict()
    config.data.records = ""  # the folder that `prepare` or `index` wrote
    config.data.split = SPLITS[chosen["data"]]
    config.data.order = "balanced"  # or "uniform" over clips
    config.data.share = 1.0  # of the clips; a larger share holds those of a smaller one
    config.data.clip_seconds = 10.0
    # Threads that read, a batch each. One reads 16 clips of PCM in the page cache in 5 ms, and more
    # do no harm; four make up for a bucket that takes 40 ms to answer. Decoding FLAC takes 4 ms of
    # a core for a clip, 1 ms for an anchor.
    config.data.threads = 4
    config.data.workers = 0  # processes that read, where threads are not enough
    config.data.class_weights = ConfigDict()  # class name -> places a round; 1 if not said
    config.data.max_corrupt = 0  # so many damaged records are said and left out
    config.data.verify = "whole"  # "always": read all of a clip to check it, for its anchor too

    # Frozen nets: bundles or workdirs of taggers, and which net each holds.
    config.sed_bundle = ""
    config.sed_net = chosen["sed"]
    config.query_bundle = ""
    config.query_net = chosen["query"]

    config.anchors = ConfigDict()
    config.anchors.source = "device"  # the detector inside the step; or "table" or "random"
    config.anchors.min_dbfs = -60.0  # quieter segments are passed over
    config.anchors.rule = "uss"  # on the device; or "htsat", HTS-AT's own, with that detector
    # Of the table that `mine` wrote.
    config.anchors.table = ""
    config.anchors.min_score = 0.0  # labels whose best anchor is less likely are not drawn
    config.anchors.top_k = 1  # draw among so many anchors of a label, in proportion to their scores
    config.anchors.jitter_samples = 0  # begin up to so many samples earlier or later

    config.speed = None  # or arguments of training/augment.py's change_speed, for small collections

    config.mixing = ConfigDict()
    config.mixing.sources = 2
    config.mixing.group_size = 16  # item i is mixed with the next of its group
    config.mixing.match_energy = True
    config.mixing.gain_db = 0.0  # then make it louder or quieter by up to so much
    # "conflict_free": items change places in their group so that no mixture holds the same or a
    # nested class twice.
    config.mixing.order = "reference"
    # Every `sources` items share one mixture, each of them a target of it.
    config.mixing.all_targets = False
    # So many items ask for a class that is not in their mixture, their target silence.
    config.mixing.silent_share = 0.0

    config.query = ConfigDict()
    config.query.kind = chosen["condition"]
    config.query.finetune = False
    config.query.adaptor_width = 0  # 0 for none
    config.query.adaptor_hidden = 2048
    config.query.shortcut = False
    config.query.dropout = 0.0  # of what the tagging net gives, in training

    config.separator = ConfigDict()
    config.separator.n_fft = 2048
    config.separator.hop_samples = 320
    config.separator.channels = (32, 64, 128, 256, 384, 384)
    config.separator.blocks_per_level = 1
    config.separator.audio_channels = 1
    config.separator.film_gain = False
    config.separator.dtype = "float32"  # or "bfloat16" inside the U-Net

    config.loss = "l1_wav"  # or "l1_wav_l1_sp", "si_sdr", "snr_threshold"
    config.weight_decay = 0.0
    config.clip_norm = 0.0  # greatest global norm of a gradient; 0 for any
    config.ema_decay = 0.0  # of a moving average of parameters, which is then used; 0 for none
    # Updates are left out where loss or gradient is NaN or infinite, or the gradient longer than
    # `max_norm_ratio` times its running median (0 for no limit); `max_skipped_steps` of them in a
    # row stop the run.
    config.max_norm_ratio = 100.0
    config.max_skipped_steps = 10
    config.schedule = ConfigDict()
    config.schedule.name = "constant_warm_up"
    config.schedule.learning_rate = 1e-3
    config.schedule.warm_up_steps = 10_000

    # How a step is done.
    config.accumulate = 1  # parts of the batch, one after the other, if it does not fit at once
    # Batch norm over the global batch, or "replica", a device's part, or so many items ("16").
    config.batch_norm = "global"
    # Precision of float32 products and convolutions of what trains; the detector's is always the
    # highest. "default" is TF32 on NVIDIA GPUs, PyTorch's own choice for convolutions, and one
    # bfloat16 pass on TPUs; "high" is TF32, or three passes; "highest" is float32, or six passes.
    # By its maker's figures an H100 multiplies 7 times as fast at "default" as at "highest", a TPU
    # 6 times; TF32 moves the published net's waveform by 1.6e-3 of its norm. On a CPU, and for what
    # computes in bfloat16, they are the same.
    config.precision = "default"
    config.remat = False  # True: compute the residual blocks twice instead of keeping their maps
    # (regular expression, "fsdp" or "replicate") of names such as params/separator/.../kernel: fsdp
    # splits an array, its moments and average over the devices. See training/mesh.py.
    config.sharding = ()

    config.log_every_steps = 100
    config.checkpoint_every_steps = 10_000
    config.keep_checkpoints = 3  # the newest
    config.keep_best = 1  # and those of the highest SDRi of an evaluation
    # A newest checkpoint found damaged is set aside for the one before it; or "stop".
    config.damaged_checkpoint = "set_aside"

    config.eval = ConfigDict()
    config.eval.pairs = ""  # a folder of pairs, as `make-pairs` writes them; none if empty
    config.eval.every_steps = 10_000

    config.profile = ConfigDict()
    config.profile.steps = ()  # (first, last): the profiler's trace of them goes to the workdir
    return config
