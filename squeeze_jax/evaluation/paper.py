"""The paper's figures (arXiv 2605.26111), to stand beside ours."""

DREAMBENCH = (
    ("OminiControl", 0.5987, 0.7840, 0.3186),
    ("EasyRef", 0.6961, 0.8153, 0.3031),
    ("Qwen-Image", 0.7317, 0.8261, 0.3158),
    ("OmniGen2", 0.7323, 0.8268, 0.3185),
    ("USO", 0.7478, 0.8263, 0.3213),
    ("UMO", 0.7481, 0.8339, 0.3022),
    ("UNO", 0.7484, 0.8354, 0.3040),
    ("DreamO", 0.7537, 0.8356, 0.3086),
    ("the paper, MLLM only", 0.6788, 0.8228, 0.2988),
    ("the paper, MLLM + VAE", 0.7482, 0.8443, 0.3010),
)
"""Method, DINO-I, CLIP-I, CLIP-T on DreamBench: 30 subjects, 25 prompts each."""

SENSITIVITY = {
    (0.0, 0.0, 2.5): (0.6905, 0.8225, 0.3044),
    (0.97, 0.90, 2.5): (0.7490, 0.8466, 0.2963),
    (0.95, 0.85, 2.5): (0.7482, 0.8443, 0.3010),
    (0.85, 0.70, 2.5): (0.7282, 0.8376, 0.3034),
    (0.95, 0.85, 4.0): (0.7431, 0.8381, 0.3012),
}
"""(τ1, τ2, CFG scale) → DINO-I, CLIP-I, CLIP-T on DreamBench."""
