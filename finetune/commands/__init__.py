"""What the commands do: one module each with one `run`, which `finetune.cli` imports when the command is used."""
