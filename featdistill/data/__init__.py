"""From manifest rows to uint8 batches (paper, sections 4.1 and 4.6).

`preprocessing` fits an image to a backbone (4.1), `train_dataset` and `loading` make batches, `mixed_sizes`
those of images that differ in size, `gpu_decoding` decodes on the GPU, `views` adds test-time views,
`amplitude_mixup` (4.6), `augmix` and `cutmix` are augmentations, `sampling` orders and balances rows, and
`image_cache` stores decoded images.
"""
