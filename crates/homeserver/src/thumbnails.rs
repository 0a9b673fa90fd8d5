//! Thumbnails, made on demand and kept beside the media.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#thumbnails>

use std::fmt;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use image::imageops::FilterType;
use image::{DynamicImage, ImageFormat, ImageReader, Limits};
use tokio::sync::Semaphore;

use crate::error::{MatrixError, Result};
use crate::media::write_whole;

/// Pictures decoded at a time.
const AT_ONCE: usize = 2;
static TURNS: Semaphore = Semaphore::const_new(AT_ONCE);
/// A picture can be small as a file and huge in memory.
const PIXELS_WIDE_MAX: u32 = 16_384;
const DECODED_BYTES_MAX: u64 = 256 << 20;

/// The sizes that are made. Others are served by the next larger one.
const SIZES: [Size; 5] = [
    Size {
        width: 32,
        height: 32,
        crop: true,
    },
    Size {
        width: 96,
        height: 96,
        crop: true,
    },
    Size {
        width: 320,
        height: 240,
        crop: false,
    },
    Size {
        width: 640,
        height: 480,
        crop: false,
    },
    Size {
        width: 800,
        height: 600,
        crop: false,
    },
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub width: u32,
    pub height: u32,
    /// Cut to the size, or scaled into it.
    pub crop: bool,
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let method = if self.crop { "crop" } else { "scale" };
        write!(f, "{}x{}-{method}", self.width, self.height)
    }
}

impl Size {
    /// The smallest of the made sizes that is large enough, with the method that was asked for.
    pub fn normal(self) -> Self {
        let fits = |size: &&Self| size.width >= self.width && size.height >= self.height;
        let size = SIZES.iter().find(fits).unwrap_or(&SIZES[SIZES.len() - 1]);
        Self {
            crop: self.crop,
            ..*size
        }
    }
}

pub(crate) struct Thumbnail {
    pub bytes: Bytes,
    pub content_type: &'static str,
}

/// The thumbnail kept at `kept`, made from `original` when it is not there yet.
pub(crate) async fn get_or_make(original: PathBuf, kept: PathBuf, size: Size) -> Result<Thumbnail> {
    let _turn = TURNS
        .acquire()
        .await
        .map_err(|_| MatrixError::internal("The server is stopping"))?;
    tokio::task::spawn_blocking(move || {
        if let Ok(bytes) = std::fs::read(&kept) {
            return Ok(label(bytes));
        }
        let source = std::fs::read(&original)
            .map_err(|_| MatrixError::internal("The media could not be read"))?;
        let bytes = make(&source, size)?;
        keep(&kept, &bytes);
        Ok(label(bytes))
    })
    .await
    .map_err(|_| MatrixError::internal("The thumbnail could not be made"))?
}

fn keep(path: &Path, bytes: &[u8]) {
    if let Err(error) = write_whole(path, bytes) {
        tracing::warn!(%error, "a thumbnail could not be kept");
    }
}

fn label(bytes: Vec<u8>) -> Thumbnail {
    let content_type =
        image::guess_format(&bytes).map_or("application/octet-stream", |f| f.to_mime_type());
    Thumbnail {
        bytes: bytes.into(),
        content_type,
    }
}

/// Width and height of a picture, without decoding it.
pub(crate) fn dimensions(bytes: &[u8]) -> Option<(u32, u32)> {
    ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .ok()?
        .into_dimensions()
        .ok()
}

fn make(source: &[u8], size: Size) -> Result<Vec<u8>> {
    let no_picture = |_| MatrixError::unknown("No thumbnail can be made of this media");
    let mut reader = ImageReader::new(Cursor::new(source))
        .with_guessed_format()
        .map_err(|_| MatrixError::unknown("No thumbnail can be made of this media"))?;
    let format = reader.format();
    let mut limits = Limits::default();
    limits.max_image_width = Some(PIXELS_WIDE_MAX);
    limits.max_image_height = Some(PIXELS_WIDE_MAX);
    limits.max_alloc = Some(DECODED_BYTES_MAX);
    reader.limits(limits);
    let picture = reader.decode().map_err(no_picture)?;
    if picture.width() <= size.width && picture.height() <= size.height {
        return Ok(source.to_vec());
    }
    let small = if size.crop {
        picture.resize_to_fill(size.width, size.height, FilterType::Triangle)
    } else {
        picture.resize(size.width, size.height, FilterType::Triangle)
    };
    let mut bytes = Cursor::new(Vec::new());
    // A photograph stays one; whatever else may be transparent.
    let (small, format) = match format {
        Some(ImageFormat::Jpeg) => (
            DynamicImage::ImageRgb8(small.into_rgb8()),
            ImageFormat::Jpeg,
        ),
        _ => (small, ImageFormat::Png),
    };
    small.write_to(&mut bytes, format).map_err(no_picture)?;
    Ok(bytes.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: u32, height: u32) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        DynamicImage::new_rgb8(width, height)
            .write_to(&mut bytes, ImageFormat::Png)
            .unwrap();
        bytes.into_inner()
    }

    #[test]
    fn a_wanted_size_becomes_the_next_that_is_made() {
        let normal = |width, height, crop| {
            Size {
                width,
                height,
                crop,
            }
            .normal()
            .to_string()
        };
        assert_eq!(normal(32, 32, false), "32x32-scale");
        assert_eq!(normal(33, 10, true), "96x96-crop");
        assert_eq!(normal(100, 240, false), "320x240-scale");
        assert_eq!(normal(5000, 5000, false), "800x600-scale");
    }

    #[test]
    fn a_thumbnail_keeps_the_proportions_or_fills_the_size() {
        let source = picture(400, 200);
        let size = |crop| Size {
            width: 32,
            height: 32,
            crop,
        };
        assert_eq!(
            dimensions(&make(&source, size(false)).unwrap()),
            Some((32, 16))
        );
        assert_eq!(
            dimensions(&make(&source, size(true)).unwrap()),
            Some((32, 32))
        );
        let small = picture(20, 10);
        assert_eq!(make(&small, size(false)).unwrap(), small);
        assert!(make(b"no picture", size(true)).is_err());
    }
}
