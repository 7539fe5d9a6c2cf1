"""Names and files of pictures: where they go, how they are encoded, latents that are kept."""
