"""Endings of the names of pictures."""


def endings(names: str) -> frozenset[str]:
    return frozenset(f".{name}" for name in names.split())


# Of what Pillow decodes here, of what it does not, and of cameras' raw files: all that users take for a picture.
PICTURES = endings("""
    png apng jpg jpeg jpe jfif jif webp gif bmp dib tif tiff avif avifs ppm pgm pbm pnm pfm jp2 j2k j2c jpc jpf jpx
    heic heif hif jxl svg svgz psd psb xcf tga dds exr hdr ico icns pcx qoi xbm xpm eps ai
    dng raw cr2 cr3 nef arw orf rw2 raf pef srw
""")
