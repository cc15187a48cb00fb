"""The page: a Gradio front end around `sampling.Pipeline`."""
