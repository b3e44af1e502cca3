"""HTS-AT on weak labels, trained from scratch with the recipe of its paper (arXiv:2202.00874).

Balanced order, mixup, SpecAugment, binary cross-entropy, AdamW at 1e-3 with weight decay 0.05,
gradient norm clipped at 1.0, batch 128. The learning rate is scaled by 0.05, 0.1 and 0.2 in the
first three epochs, and halved after 11 and 21 epochs; the authors' released configuration has 0.02,
0.05 and 0.1 instead. The authors' mixup blends only the inputs, within a batch; here it blends the
labels too, and reads twice as many clips. They report mAP 0.471 on AudioSet's evaluation set for a
net initialised from weights trained on images, which this recipe does not use.

    uss-jax train-tagger --config configs/tagger_htsat.py --workdir runs/htsat \
        --config.data.records=/data/audioset/1.0.0
"""

from ml_collections import ConfigDict

EPOCH_STEPS = 15_600  # 2 M clips


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.seed = 1234
    config.sample_rate = 32000
    config.segment_seconds = 2.0  # length of anchors for users of the net as detector
    config.total_steps = 30 * EPOCH_STEPS
    config.global_batch = 128  # after mixup, which reads twice as many clips

    config.data = ConfigDict()
    config.data.records = ""
    config.data.split = "full_train"
    config.data.order = "balanced"
    config.data.share = 1.0  # fraction of the clips used; larger fractions contain smaller ones
    config.data.clip_seconds = 10.0
    config.data.class_weights = ConfigDict()  # class name -> draws per round; default 1
    config.data.max_corrupt = 0  # damaged records to report and replace before failing
    # Reader threads, one batch each. One reads 16 PCM clips from the page cache in 5 ms; four hide
    # a bucket's latency of 40 ms; more do no harm. Decoding FLAC takes 4 ms of a core per clip,
    # 1 ms per anchor.
    config.data.threads = 4
    config.data.workers = 0  # reader processes, for when threads are not enough

    config.tagger = ConfigDict()
    config.tagger.net = "htsat"
    config.tagger.n_fft = 1024
    config.tagger.hop_samples = 320
    config.tagger.mel_bins = 64
    config.tagger.f_min = 50.0
    config.tagger.f_max = 14000.0
    config.tagger.image_size = 256
    config.tagger.token_width = 96  # 256 gives embeddings of width 2048
    config.tagger.depths = (2, 2, 6, 2)
    config.tagger.heads = (4, 8, 16, 32)
    config.tagger.classes = 527
    config.tagger.repeat_short = True  # repeat clips that fit more than once; False: stretch them
    config.tagger.stochastic_depth = 0.1
    config.tagger.dtype = "float32"
    # Precision of float32 products and convolutions. NVIDIA GPUs: "default" and "high" are TF32
    # (PyTorch's default for convolutions), "highest" is float32. TPUs: 1, 3 and 6 bfloat16 passes.
    # By its maker's figures an H100 multiplies 7 times as fast at "default" as at "highest", a TPU
    # 6 times. On a CPU all are the same. Detection always runs at "highest", however the net was
    # trained.
    config.precision = "default"

    config.outputs = ("clipwise",)
    config.speed = None  # or arguments of change_speed in training/augment.py
    config.noise = None  # or arguments of add_noise in training/augment.py
    config.mixup_alpha = 0.5
    config.spec_augment = ConfigDict()
    config.spec_augment.time_width = 64
    config.spec_augment.time_stripes = 2
    config.spec_augment.mel_width = 8
    config.spec_augment.mel_stripes = 2

    config.norm_momentum = 0.1  # weight of a batch in the running statistics of batch norm
    config.optimizer = "adamw"
    config.weight_decay = 0.05
    config.clip_norm = 1.0  # maximum global norm of the gradient; 0 for no limit
    config.schedule = ConfigDict()
    config.schedule.name = "stepped"
    config.schedule.learning_rate = 1e-3
    config.schedule.boundaries = tuple(epoch * EPOCH_STEPS for epoch in (1, 2, 11, 21))
    config.schedule.scales = (0.05, 0.1, 0.2, 0.1, 0.05)

    # An update is skipped if the loss or gradient is NaN or infinite, or the gradient norm exceeds
    # `max_norm_ratio` times its running median (0 for no limit). `max_skipped_steps` skips in a row
    # stop the run.
    config.max_norm_ratio = 100.0
    config.max_skipped_steps = 10

    config.log_every_steps = 100
    config.checkpoint_every_steps = 10_000
    config.keep_checkpoints = 3
    # If the newest checkpoint is damaged: "set_aside" to resume from the one before, or "stop".
    config.damaged_checkpoint = "set_aside"
    # Bundle, workdir or converted checkpoint whose parameters a new run starts from; "" for none.
    config.init_from = ""
    config.init_partly = False  # take what has the same name and shape, else all must

    config.profile = ConfigDict()
    config.profile.steps = ()  # (first, last) steps to profile; the trace goes to the workdir
    return config
