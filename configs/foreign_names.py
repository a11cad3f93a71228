"""Names of settings in other libraries, and their names here. Imports no torch.

Lightning's Trainer and callbacks, diffusers' training scripts and pipelines, transformers' TrainingArguments, Hydra,
torchrun. Each maps to a setting or, where there is none, to a sentence that says what to do instead.
"""

from switti.sampling.config import FOREIGN as SAMPLING

_STEPS = "runs are measured in optimizer steps: trainer.max_steps"
_RESUME = (
    "the same command resumes its run by itself; init_from=RUN starts a new run from the weights of another"
)
_TRIAL = "for a quick trial: trainer.fast_dev_run=true"
_LAUNCH = "give trainer.devices and trainer.num_nodes, and start the ranks with torchrun or srun"
_HYDRA = "there is no Hydra here: settings are plain key=value, grids are studies (experiments.sweep)"
_SCHEDULE = "optimizer.schedule is linear, cosine or constant, after optimizer.warmup_steps"
_SIZE = "the size of images follows from the tokenizer's finest scale: tokenizer.scales"
_BAR = "the progress bar cannot be switched off; sweeps write it to the run's output.log"

_MEANT: dict[str, tuple[str, ...]] = {
    "seed": ("seed_everything", "manual_seed", "random_seed", "global_seed", "rng_seed"),
    "name": ("run_name", "exp_name", "experiment_name", "job_name", "version"),
    "study": ("experiment", "project", "project_name", "wandb_project", "group", "study_name", "sweep_name"),
    "runs_dir": (
        "output_dir", "out_dir", "outdir", "default_root_dir", "log_dir", "logging_dir", "save_dir", "dirpath",
        "work_dir", "workdir", "run_dir", "results_dir", "checkpoint_dir", "logs_dir",
    ),
    "init_from": (
        "pretrained_model_name_or_path", "model_name_or_path", "pretrained", "pretrained_path", "load_from",
        "finetune_from", "init_checkpoint", "initial_checkpoint", "load_weights", "weights",
    ),
    "tokenizer_weights": (
        "vae", "vae_path", "vae_ckpt", "vqvae", "vae_model", "pretrained_vae_model_name_or_path", "tokenizer_path",
        "tokenizer_ckpt", "tokenizer_checkpoint", "first_stage", "tokenizer_name",
    ),
    "data.train": (
        "train_data", "train_data_dir", "train_dataset", "dataset", "dataset_name", "data_dir", "data_path",
        "data_root", "train_files", "train_shards", "train_path", "shards", "instance_data_dir", "train_url",
    ),
    "data.validation": (
        "val_data", "valid_data", "val_dataset", "eval_dataset", "validation_data", "val_data_dir", "val_path",
        "validation_dataset", "val", "valid", "val_shards", "validation_files",
    ),
    "callbacks.objective_dynamics.criterion": ("early_stopping", "early_stop", "early_stopping_criterion"),
    "callbacks.objective_dynamics.patience": ("early_stopping_patience",),
    "data.batch_size": (
        "train_batch_size", "per_device_train_batch_size", "per_gpu_train_batch_size", "global_batch_size",
        "micro_batch_size", "total_batch_size", "bs", "batchsize", "per_device_batch_size",
    ),
    "data.workers": ("num_workers", "dataloader_num_workers", "n_workers", "num_data_workers", "dataloader_workers"),
    "data.caption_dropout": (
        "cfg_dropout", "cond_dropout", "uncond_prob", "label_dropout", "class_dropout_prob", "proportion_empty_prompts",
        "cfg_drop_rate", "condition_dropout", "text_dropout", "null_prob",
    ),
    "text.encoder": ("text_encoder", "text_model", "text_encoder_name"),
    "text.max_length": ("max_sequence_length", "max_seq_length", "tokenizer_max_length", "model_max_length"),
    "optimizer.learning_rate": (
        "lr", "base_lr", "max_lr", "peak_lr", "initial_lr", "init_lr", "lr0", "base_learning_rate", "tlr",
    ),
    "optimizer.final_learning_rate": ("min_lr", "eta_min", "end_lr", "final_lr", "lr_min", "min_learning_rate"),
    "optimizer.warmup_steps": (
        "lr_warmup_steps", "num_warmup_steps", "warmup_iters", "warmup", "n_warmup_steps", "lr_warmup",
    ),
    "optimizer.weight_decay": ("wd", "adam_weight_decay", "l2"),
    "optimizer.betas": ("adam_beta1", "adam_beta2", "beta1", "beta2", "adam_betas"),
    "optimizer.eps": ("adam_epsilon", "epsilon", "adam_eps"),
    "loss.label_smoothing": ("smoothing", "label_smoothing_factor", "ls"),
    "model.depth": (
        "num_layers", "n_layers", "layers", "n_layer", "num_hidden_layers", "num_blocks", "n_blocks",
        "transformer_depth",
    ),
    "model.width": (
        "hidden_size", "d_model", "dim", "n_embd", "embed_dim", "hidden_dim", "model_dim", "hidden_width",
        "model_channels",
    ),
    "model.heads": ("num_heads", "n_heads", "n_head", "num_attention_heads", "attention_heads"),
    "model.visibility": ("causal", "is_causal", "use_ar", "attention_mask", "autoregressive", "attn_mask"),
    "model.ffn": ("use_swiglu_ffn", "mlp", "activation", "act_fn", "hidden_act"),
    "model.norms": ("norm_type", "norm_layer", "prenorm", "pre_norm", "sandwich_norm", "layernorm"),
    "model.query_key_norm": ("qk_norm", "use_qk_norm", "qknorm"),
    "model.crop_condition": ("use_crop_cond", "crop_cond", "size_condition"),
    "model.scales": ("patch_nums", "pn", "num_scales", "v_patch_nums"),
    "tokenizer.codebook_size": ("vocab_size", "n_embed", "num_embeddings", "num_codes", "codebook", "n_codes"),
    "callbacks.ema_decay": ("ema", "use_ema", "ema_rate", "ema_beta", "swa", "ema_halflife", "ema_momentum"),
    "callbacks.checkpoint_every": (
        "every_n_train_steps", "save_steps", "checkpointing_steps", "save_every", "save_interval", "ckpt_every",
        "checkpoint_interval", "save_freq", "checkpoint_frequency", "save_every_n_steps", "checkpoint_steps",
    ),
    "callbacks.keep_last": ("save_total_limit", "checkpoints_total_limit", "save_top_k", "keep_checkpoints"),
    "callbacks.best_metric": ("monitor", "metric_for_best_model"),
    "callbacks.best_mode": ("greater_is_better", "monitor_mode"),
    "callbacks.samples_every": ("sample_every", "validation_steps", "image_every", "log_images_every"),
    "callbacks.sample_prompts": ("validation_prompt", "validation_prompts", "val_prompts"),
    "callbacks.sample_count": ("num_validation_images", "num_samples", "n_samples"),
    "trainer.max_steps": (
        "max_train_steps", "train_steps", "num_train_steps", "total_steps", "max_iters", "max_iterations", "num_iters",
        "steps", "iterations", "n_steps", "training_steps", "total_training_steps", "train_iters", "num_steps",
    ),
    "trainer.precision": ("mixed_precision", "dtype", "fp16", "bf16", "amp", "use_amp", "half", "autocast"),
    "trainer.devices": ("gpus", "num_gpus", "n_gpus", "num_devices", "nproc_per_node", "num_processes", "ngpus"),
    "trainer.num_nodes": ("nnodes", "num_machines", "nodes", "n_nodes"),
    "trainer.accelerator": ("device", "cuda", "cpu", "gpu", "use_cuda", "no_cuda", "use_gpu"),
    "trainer.strategy": ("fsdp", "ddp", "distributed", "parallel", "distributed_backend", "sharding_strategy"),
    "trainer.accumulate": (
        "accumulate_grad_batches", "gradient_accumulation_steps", "grad_accum", "grad_accumulation",
        "gradient_accumulation", "accum_iter", "accumulation_steps", "grad_accum_steps",
    ),
    "trainer.gradient_clip": (
        "gradient_clip_val", "max_grad_norm", "clip_grad_norm", "grad_clip", "clip_grad", "gradient_clip_norm",
        "gradient_clipping", "clip_norm",
    ),
    "trainer.checkpointing": (
        "gradient_checkpointing", "activation_checkpointing", "enable_gradient_checkpointing", "grad_checkpointing",
        "grad_ckpt", "use_checkpoint", "recompute",
    ),
    "trainer.compile": ("torch_compile", "compile_model", "use_compile"),
    "trainer.validate_every": (
        "val_check_interval", "eval_every", "eval_steps", "check_val_every_n_epoch", "val_every", "eval_interval",
        "validation_interval", "eval_freq", "val_freq", "check_val_every_n_steps", "val_interval", "eval_frequency",
    ),
    "trainer.validate_batches": ("limit_val_batches", "eval_iters", "num_val_batches", "eval_batches"),
    "trainer.log_every": ("log_every_n_steps", "logging_steps", "log_interval", "log_freq", "print_every"),
    "trainer.loggers": (
        "logger", "wandb", "wandb.", "use_wandb", "report_to", "tensorboard", "csv_logger", "mlflow",
        "log_wandb",
    ),
    "trainer.fast_dev_run": ("debug", "dry_run"),
    "trainer.deterministic": ("benchmark", "cudnn_deterministic", "use_deterministic_algorithms", "full_determinism"),
}  # fmt: skip
_INSTEAD: dict[str, tuple[str, ...]] = {
    _SIZE: ("image_size", "img_size", "image_resolution", "size", "crop_size", "input_size", "reso"),
    _STEPS: ("max_epochs", "epochs", "num_epochs", "num_train_epochs", "n_epochs", "min_epochs", "epoch", "max_time"),
    _RESUME: (
        "ckpt_path", "resume", "resume_from_checkpoint", "resume_from", "resume_path", "auto_resume", "checkpoint",
        "checkpoint_path", "ckpt", "load_checkpoint", "restore_from",
    ),
    _TRIAL: ("overfit_batches", "num_sanity_val_steps"),
    _LAUNCH: ("world_size", "local_rank", "rank", "node_rank", "master_addr", "master_port", "rdzv_endpoint"),
    _HYDRA: ("hydra", "hydra.", "defaults", "multirun", "config_name", "config_path", "config_dir"),
    _SCHEDULE: ("lr_scheduler", "scheduler", "lr_scheduler_type", "lr_schedule", "sched", "lr_decay"),
    _BAR: ("enable_progress_bar", "progress_bar", "disable_tqdm", "enable_model_summary", "progress_bar_refresh_rate"),
    "checkpoints are always written, every callbacks.checkpoint_every steps": ("enable_checkpointing", "save_last"),
    "the optimizer is AdamW; optimizer.* holds its settings": ("optim", "optimizer_type", "use_8bit_adam", "adamw"),
    "samples are always shuffled; data.shuffle_window_shards sets how widely": ("shuffle", "shuffle_buffer"),
}  # fmt: skip

# Foreign name (its last part, or its first one followed by a dot) → a setting, or a sentence on what to do instead.
FOREIGN: dict[str, str] = {
    **{name: meant if " " in meant else f"sampling.{meant}" for name, meant in SAMPLING.items()},
    **{name: meant for table in (_MEANT, _INSTEAD) for meant, names in table.items() for name in names},
}
