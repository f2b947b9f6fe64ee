"""The demo model: a tiny PaliGemma on easy-VQA, its data, its base and its order of questions."""
