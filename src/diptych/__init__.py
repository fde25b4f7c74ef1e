"""Contrastive vision-language learning, from raw image-text pairs to an audited model in use."""
