"""What the commands do once they are asked for; `finetune.cli` imports each of these only then."""
