//! What people bring from other tools: their keys and values, and what they are called here. Data only.

/// A key of another tool.
pub(super) struct ForeignKey {
    /// As Axolotl, LLaMA-Factory, TRL, transformers, PEFT or torchtune call it.
    pub key: &'static str,
    /// The key here; empty where there is none.
    pub here: &'static str,
    /// What else to know.
    pub note: &'static str,
}

const fn same(key: &'static str, here: &'static str) -> ForeignKey {
    ForeignKey { key, here, note: "" }
}

const fn noted(key: &'static str, here: &'static str, note: &'static str) -> ForeignKey {
    ForeignKey { key, here, note }
}

const NO_QUANTISATION: &str = "this version trains on a base that is not quantised: leave it out";
const PREPARED: &str = "the data is prepared on all threads and keeps ahead on its own: leave it out";
const FUSED: &str = "engraft's own kernels are always used: leave it out";
const LOGS: &str = "runs are logged to metrics.jsonl, report.html and TensorBoard: leave it out";
const HUB: &str = "engraft uploads nothing: leave it out, and upload the output folder with `hf upload`";
const OWN_TOKENIZER: &str = "the model's own tokenizer is used: leave it out";
const LAYOUT: &str = "the columns say what a row is; name them with `dataset.columns` where they are called otherwise";

/// Keys that are not ours under any section, by the name that is looked up.
pub(super) const KEYS: &[ForeignKey] = &[
    // The base.
    same("model", "base_model"),
    same("model_name", "base_model"),
    same("model_id", "base_model"),
    same("model_path", "base_model"),
    same("model_name_or_path", "base_model"),
    same("pretrained_model_name_or_path", "base_model"),
    same("model_revision", "revision"),
    same("revision_of_model", "revision"),
    same("torch_dtype", "dtype"),
    same("compute_dtype", "dtype"),
    same("precision", "dtype"),
    noted("bf16", "dtype", ": `bf16`"),
    noted("bfloat16", "dtype", ": `bf16`"),
    noted("fp16", "dtype", ": `fp16`"),
    noted("float16", "dtype", ": `fp16`"),
    noted("fp32", "dtype", ": `fp32`"),
    noted("tf32", "", "set `dtype` instead: `bf16`, `fp16` or `fp32`"),
    noted("no_cuda", "device", ": `cpu`"),
    noted("use_cpu", "device", ": `cpu`"),
    noted("trust_remote_code", "", "engraft never runs code from a model's repository: leave it out"),
    noted("model_type", "", "the model's own config.json says what it is: leave it out"),
    noted("tokenizer_type", "", OWN_TOKENIZER),
    noted("tokenizer", "", OWN_TOKENIZER),
    noted("special_tokens", "", "the model's own special tokens are used: leave it out"),
    noted("compile", "", FUSED),
    noted("torch_compile", "", FUSED),
    noted("plugins", "", FUSED),
    noted("use_liger_kernel", "", FUSED),
    noted("liger_rope", "", FUSED),
    noted("liger_rms_norm", "", FUSED),
    noted("liger_glu_activation", "", FUSED),
    noted("liger_swiglu", "", FUSED),
    noted("liger_cross_entropy", "", FUSED),
    noted("liger_fused_linear_cross_entropy", "", FUSED),
    noted("checkpointer", "base_model", ": the model's folder"),
    noted("load_in_4bit", "", NO_QUANTISATION),
    noted("load_in_8bit", "", NO_QUANTISATION),
    noted("quantization_bit", "", NO_QUANTISATION),
    noted("bnb_4bit_quant_type", "", NO_QUANTISATION),
    noted("flash_attention", "", "attention is always fused: leave it out"),
    noted("flash_attn", "", "attention is always fused: leave it out"),
    noted("attn_implementation", "", "attention is always fused: leave it out"),
    // The adapter.
    same("peft_type", "adapter.method"),
    same("peft_method", "adapter.method"),
    same("finetuning_type", "adapter.method"),
    same("lora", "adapter"),
    same("peft", "adapter"),
    same("lora_config", "adapter"),
    same("peft_config", "adapter"),
    noted("use_peft", "", "engraft always trains an adapter: leave it out"),
    noted("stage", "", "engraft does supervised fine-tuning: leave it out"),
    noted("do_train", "", "the command says what is done: leave it out"),
    noted("task_type", "", "every base is a causal language model: leave it out"),
    noted("bias", "", "biases stay frozen: leave it out"),
    same("lora_r", "adapter.r"),
    same("lora_rank", "adapter.r"),
    same("rank", "adapter.r"),
    same("alpha", "adapter.lora_alpha"),
    same("dropout", "adapter.lora_dropout"),
    same("lora_target_modules", "adapter.target_modules"),
    same("lora_target", "adapter.target_modules"),
    same("lora_modules", "adapter.target_modules"),
    same("lora_attn_modules", "adapter.target_modules"),
    noted("lora_target_linear", "adapter.target_modules", ": `all-linear` (which is the default)"),
    same("lora_layers_to_transform", "adapter.layers_to_transform"),
    same("peft_layers_to_transform", "adapter.layers_to_transform"),
    same("lora_rank_pattern", "adapter.rank_pattern"),
    same("lora_alpha_pattern", "adapter.alpha_pattern"),
    same("peft_use_rslora", "adapter.use_rslora"),
    same("rslora", "adapter.use_rslora"),
    same("peft_init_lora_weights", "adapter.init_lora_weights"),
    same("lora_model_dir", "adapter.adapter_name_or_path"),
    same("adapter_path", "adapter.adapter_name_or_path"),
    same("resume_adapter", "adapter.adapter_name_or_path"),
    noted("use_dora", "", "this version trains plain LoRA: leave it out"),
    noted("peft_use_dora", "", "this version trains plain LoRA: leave it out"),
    noted("modules_to_save", "", "this version trains adapters only, no whole modules: leave it out"),
    noted("lora_modules_to_save", "", "this version trains adapters only, no whole modules: leave it out"),
    noted("loraplus_lr_ratio", "", "this version has one learning rate for A and B: leave it out"),
    // The data.
    same("data", "dataset"),
    same("datasets", "dataset.train"),
    same("train_dataset", "dataset.train"),
    same("train_file", "dataset.train"),
    same("train_files", "dataset.train"),
    same("data_files", "dataset.train"),
    same("data_path", "dataset.train"),
    same("dataset_name", "dataset.train"),
    same("path", "dataset.train"),
    same("eval_dataset", "dataset.eval"),
    same("eval_file", "dataset.eval"),
    same("test_datasets", "dataset.eval"),
    same("validation", "dataset.eval"),
    same("validation_file", "dataset.eval"),
    same("valid", "dataset.eval"),
    noted("val_set_size", "dataset.eval", ": a parquet file of held-out rows"),
    noted("val_size", "dataset.eval", ": a parquet file of held-out rows"),
    noted("split", "dataset.train", ": the parquet files of that split"),
    same("type", "dataset.format"),
    same("dataset_format", "dataset.format"),
    same("template", "dataset.chat_template"),
    same("chat_template_jinja", "dataset.chat_template"),
    same("chat_template_path", "dataset.chat_template"),
    same("system_prompt", "dataset.system"),
    same("default_system_message", "dataset.system"),
    noted("field_messages", "dataset.columns", ": {messages: ...}"),
    noted("messages_field", "dataset.columns", ": {messages: ...}"),
    noted("dataset_text_field", "dataset.columns", ": {text: ...}"),
    noted("text_column", "dataset.columns", ": {text: ...}"),
    noted("message_property_mappings", "dataset.columns", ""),
    noted("remove_unused_columns", "", LAYOUT),
    same("sequence_len", "dataset.max_length"),
    same("sequence_length", "dataset.max_length"),
    same("seq_length", "dataset.max_length"),
    same("max_seq_length", "dataset.max_length"),
    same("max_seq_len", "dataset.max_length"),
    same("model_max_length", "dataset.max_length"),
    same("cutoff_len", "dataset.max_length"),
    same("block_size", "dataset.max_length"),
    same("sample_packing", "dataset.packing"),
    same("neat_packing", "dataset.packing"),
    same("pack", "dataset.packing"),
    noted("eval_sample_packing", "dataset.packing", ", which holds for both sets"),
    noted("eval_packing", "dataset.packing", ", which holds for both sets"),
    noted("pad_to_sequence_len", "", "nothing is ever padded: leave it out"),
    noted("group_by_length", "", "nothing is ever padded: leave it out"),
    noted("train_on_inputs", "dataset.train_on", ": `all` for true, `completion` for false"),
    noted("train_on_prompt", "dataset.train_on", ": `all` for true, `completion` for false"),
    noted("completion_only_loss", "dataset.train_on", ": `completion` for true, `all` for false"),
    noted("assistant_only_loss", "dataset.train_on", ": `assistant` for true, `all` for false"),
    noted("mask_history", "dataset.train_on", ": `last-assistant` for true"),
    noted("roles_to_train", "dataset.train_on", ": `assistant` or `all`"),
    noted("train_on_eos", "", "the end-of-turn token of a trained turn is always trained: leave it out"),
    same("max_samples", "dataset.limit"),
    same("max_train_samples", "dataset.limit"),
    same("shuffle_dataset", "dataset.shuffle"),
    // The training.
    same("trainer", "training"),
    same("training_args", "training"),
    same("training_arguments", "training"),
    same("num_train_epochs", "training.epochs"),
    same("num_epochs", "training.epochs"),
    same("epoch", "training.epochs"),
    same("max_epochs", "training.epochs"),
    same("steps", "training.max_steps"),
    same("iters", "training.max_steps"),
    same("max_iters", "training.max_steps"),
    same("max_steps_per_epoch", "training.max_steps"),
    same("per_device_train_batch_size", "training.micro_batch_size"),
    same("train_batch_size", "training.micro_batch_size"),
    same("batch_size", "training.micro_batch_size"),
    noted("per_device_eval_batch_size", "training.micro_batch_size", ", which holds for both sets"),
    noted("eval_batch_size", "training.micro_batch_size", ", which holds for both sets"),
    same("gradient_accumulation", "training.gradient_accumulation_steps"),
    same("grad_accumulation_steps", "training.gradient_accumulation_steps"),
    same("accumulation_steps", "training.gradient_accumulation_steps"),
    same("lr", "training.learning_rate"),
    same("optim", "training.optimizer"),
    same("betas", "training.adam_beta1"),
    same("beta1", "training.adam_beta1"),
    same("beta2", "training.adam_beta2"),
    same("eps", "training.adam_epsilon"),
    same("lr_scheduler_type", "training.lr_scheduler"),
    same("scheduler", "training.lr_scheduler"),
    same("lr_warmup_steps", "training.warmup_steps"),
    same("num_warmup_steps", "training.warmup_steps"),
    same("warmup_fraction", "training.warmup_ratio"),
    same("gradient_clipping", "training.max_grad_norm"),
    same("gradient_clip_val", "training.max_grad_norm"),
    same("clip_grad_norm", "training.max_grad_norm"),
    noted("gradient_checkpointing", "training.recompute", ": `full` for true, `none` for false, or `auto`"),
    noted("use_gradient_checkpointing", "training.recompute", ": `full` for true, `none` for false, or `auto`"),
    noted("grad_checkpoint", "training.recompute", ": `full` for true, `none` for false, or `auto`"),
    noted("activation_checkpointing", "training.recompute", ": `full` for true, `none` for false, or `auto`"),
    noted("activation_checkpointing_mode", "training.recompute", ": `full`, `none` or `auto`"),
    noted("enable_activation_checkpointing", "training.recompute", ": `full` for true, `none` for false, or `auto`"),
    same("random_seed", "training.seed"),
    same("data_seed", "training.seed"),
    same("log_steps", "training.logging_steps"),
    same("log_every_n_steps", "training.logging_steps"),
    same("steps_per_report", "training.logging_steps"),
    same("steps_per_eval", "training.eval_steps"),
    same("save_every", "training.save_steps"),
    same("early_stopping", "training.early_stopping_patience"),
    same("neftune_alpha", "training.neftune_noise_alpha"),
    same("noise_alpha", "training.neftune_noise_alpha"),
    same("aux_loss_coef", "training.router_aux_loss_coef"),
    same("moe_aux_loss_coef", "training.router_aux_loss_coef"),
    same("num_threads", "training.threads"),
    noted("eval_strategy", "training.eval_steps", "; without it each epoch ends with an evaluation"),
    noted("evaluation_strategy", "training.eval_steps", "; without it each epoch ends with an evaluation"),
    noted("evals_per_epoch", "training.eval_steps", ""),
    noted("save_strategy", "training.save_steps", ""),
    noted("saves_per_epoch", "training.save_steps", ""),
    noted("logging_strategy", "training.logging_steps", ""),
    noted("metric_for_best_model", "", "the best evaluation is the one with the lowest loss: leave it out"),
    noted("dataloader_num_workers", "", PREPARED),
    noted("dataset_num_proc", "", PREPARED),
    noted("dataset_processes", "", PREPARED),
    noted("preprocessing_num_workers", "", PREPARED),
    noted("resume", "", "resuming is said on the command line: `engraft train recipe.yaml --resume`"),
    noted("resume_from_checkpoint", "", "resuming is said on the command line: `engraft train recipe.yaml --resume`"),
    noted(
        "auto_resume_from_checkpoints",
        "",
        "resuming is said on the command line: `engraft train recipe.yaml --resume`",
    ),
    noted("deepspeed", "", "this version trains on one device: leave it out"),
    noted("fsdp", "", "this version trains on one device: leave it out"),
    // The output.
    same("output_dir", "output.dir"),
    same("out_dir", "output.dir"),
    same("save_dir", "output.dir"),
    noted("merge", "output.save", ": [adapter, merged]"),
    noted("merge_lora", "output.save", ": [adapter, merged]"),
    noted("save_merged", "output.save", ": [adapter, merged]"),
    noted("use_tensorboard", "output.tensorboard", ""),
    noted("report_to", "output.tensorboard", ": true; a metrics.jsonl and a report.html are always written"),
    noted("wandb_project", "", LOGS),
    noted("wandb_entity", "", LOGS),
    noted("wandb_name", "", LOGS),
    noted("wandb_run_id", "", LOGS),
    noted("wandb_watch", "", LOGS),
    noted("wandb_log_model", "", LOGS),
    noted("mlflow_tracking_uri", "", LOGS),
    noted("run_name", "output.dir", ", whose last part names the run"),
    noted("push_to_hub", "", HUB),
    noted("hub_model_id", "", HUB),
    noted("hub_strategy", "", HUB),
    noted("save_safetensors", "", "everything is written as safetensors: leave it out"),
    noted(
        "overwrite_output_dir",
        "",
        "overwriting is said on the command line: `engraft train recipe.yaml --overwrite`",
    ),
];

/// A value of another tool: the key here, their value, ours.
pub(super) const VALUES: &[(&str, &str, &str)] = &[
    ("dtype", "bfloat16", "bf16"),
    ("dtype", "float16", "fp16"),
    ("dtype", "half", "fp16"),
    ("dtype", "16", "fp16"),
    ("dtype", "float32", "fp32"),
    ("dtype", "float", "fp32"),
    ("dtype", "32", "fp32"),
    ("device", "gpu", "cuda"),
    ("device", "cuda:0", "cuda"),
    ("device", "0", "cuda"),
    ("adapter", "lora", "{method: lora}"),
    ("adapter.method", "LORA", "lora"),
    ("adapter.init_lora_weights", "true", "kaiming"),
    ("adapter.init_lora_weights", "default", "kaiming"),
    ("adapter.init_lora_weights", "kaiming_uniform", "kaiming"),
    ("adapter.target_modules", "all", "all-linear"),
    ("adapter.target_modules", "linear", "all-linear"),
    ("dataset.format", "chat", "messages"),
    ("dataset.format", "chat_template", "messages"),
    ("dataset.format", "conversations", "messages"),
    ("dataset.format", "conversational", "messages"),
    ("dataset.format", "sharegpt", "messages"),
    ("dataset.format", "chatml", "messages"),
    ("dataset.format", "openai", "messages"),
    ("dataset.format", "alpaca", "instruction"),
    ("dataset.format", "completion", "text"),
    ("dataset.format", "pretrain", "text"),
    ("dataset.format", "language_modeling", "text"),
    ("dataset.format", "prompt_completion", "prompt-completion"),
    ("dataset.format", "input_output", "prompt-completion"),
    ("dataset.train_on", "completions", "completion"),
    ("dataset.train_on", "output", "completion"),
    ("dataset.train_on", "assistants", "assistant"),
    ("dataset.train_on", "last", "last-assistant"),
    ("dataset.train_on", "last_assistant", "last-assistant"),
    ("dataset.overlong", "skip", "drop"),
    ("dataset.on_bad_row", "drop", "skip"),
    ("training.optimizer", "adam", "adamw"),
    ("training.optimizer", "adamw_torch", "adamw"),
    ("training.optimizer", "adamw_torch_fused", "adamw"),
    ("training.optimizer", "adamw_hf", "adamw"),
    ("training.lr_scheduler", "cosine_with_warmup", "cosine"),
    ("training.lr_scheduler", "linear_with_warmup", "linear"),
    ("training.lr_scheduler", "constant_with_warmup", "constant"),
    ("training.recompute", "true", "full"),
    ("training.recompute", "false", "none"),
    ("training.recompute", "null", "none"),
    ("training.recompute", "unsloth", "full"),
    ("output.save", "adapter", "[adapter]"),
    ("output.save", "merged", "[merged]"),
    ("output.save", "both", "[adapter, merged]"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::check::known_keys;
    use crate::recipe::json_schema;

    #[test]
    fn the_tables_lead_to_keys_that_exist() {
        let known = known_keys(&json_schema());
        for foreign in KEYS {
            assert!(foreign.here.is_empty() || known.iter().any(|key| key == foreign.here), "{}", foreign.key);
            assert!(!foreign.here.is_empty() || !foreign.note.is_empty(), "{} has no way out", foreign.key);
        }
        for (key, value, _) in VALUES {
            assert!(known.iter().any(|known| known == key), "{key}: {value}");
        }
    }

    #[test]
    fn overwriting_is_answered_with_the_option_there_is() {
        let foreign = KEYS.iter().find(|foreign| foreign.key == "overwrite_output_dir").unwrap();
        assert!(foreign.note.contains("--overwrite"), "{}", foreign.note);
    }

    #[test]
    fn keys_that_many_bring_along_are_answered() {
        for key in [
            "wandb_entity",
            "plugins",
            "liger_rope",
            "special_tokens",
            "hub_model_id",
            "push_to_hub",
            "run_name",
            "dataset_num_proc",
            "preprocessing_num_workers",
            "tokenizer",
            "checkpointer",
            "compile",
        ] {
            assert!(KEYS.iter().any(|foreign| foreign.key == key), "{key}");
        }
    }

    #[test]
    fn no_foreign_key_is_named_twice() {
        for (index, foreign) in KEYS.iter().enumerate() {
            assert!(!KEYS[index + 1..].iter().any(|other| other.key == foreign.key), "{}", foreign.key);
        }
    }
}
