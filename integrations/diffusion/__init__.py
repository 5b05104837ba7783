"""What the integrations of diffusion systems share: the denoiser, and the two calls of a guidance pair as one step."""
