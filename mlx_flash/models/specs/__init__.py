"""What a checkpoint is: families, configs, folders of Hugging Face."""
