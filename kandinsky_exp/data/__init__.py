"""Images and captions: where they come from, what the encoders read, the encoded table, and the order of visits."""
