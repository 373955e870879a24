//! The bytes of a file: decompressed, decoded to UTF-8, and refused if they are no text.

use std::io::{self, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use crate::error::{Error, Result};

use super::column::argument;

/// Bytes by which the form of a file is recognised.
pub(super) const SAMPLE_BYTES: usize = 64 << 10;

const GZIP: &[u8] = b"\x1F\x8B";
const ZSTD: &[u8] = b"\x28\xB5\x2F\xFD";

/// Magic bytes at the start of files that are not lists of rows: what they are, and how to convert them. `FILE`
/// stands for the file's name.
const FOREIGN: [(&[u8], &str, &str); 23] = [
    (b"GGUF", "a GGUF model", "give the model with -m"),
    (b"PAR1", "a Parquet file", PANDAS_PARQUET),
    (b"ARROW1", "an Arrow file", PANDAS_FEATHER),
    (b"FEA1", "a Feather file", PANDAS_FEATHER),
    (b"BZh", "bzip2 data", "decompress it first: bunzip2 -k FILE"),
    (b"\xFD7zXZ\0", "xz data", "decompress it first: unxz -k FILE"),
    (b"\x04\x22\x4D\x18", "lz4 data", "decompress it first: unlz4 FILE"),
    (b"7z\xBC\xAF\x27\x1C", "a 7z archive", "unpack it first: 7z x FILE"),
    (b"Rar!", "a RAR archive", "unpack it first: unrar x FILE"),
    (b"%PDF", "a PDF", "copy its text into a .txt file, one row a line"),
    (b"{\\rtf", "an RTF document", "save it as plain text in UTF-8"),
    (
        b"SQLite format 3\0",
        "an SQLite database",
        "export a table: sqlite3 -json FILE 'SELECT * FROM NAME' > rows.json",
    ),
    (b"\x93NUMPY", "a NumPy array", "write its texts as JSON lines"),
    (b"\x89HDF", "an HDF5 file", "write its texts as JSON lines"),
    (b"\xD0\xCF\x11\xE0", "an old Office document (.xls, .doc)", "save it as \"CSV UTF-8\""),
    (b"Obj\x01", "an Avro file", "write its rows as JSON lines"),
    (b"\x7FELF", "a program", "give a text file"),
    (b"\x89PNG", "an image", "give a text file"),
    (b"\xFF\xD8\xFF", "an image", "give a text file"),
    (b"GIF8", "an image", "give a text file"),
    (b"\x80\x02", "a Python pickle", PANDAS_PICKLE),
    (b"\x80\x04", "a Python pickle", PANDAS_PICKLE),
    (b"\x80\x05", "a Python pickle", PANDAS_PICKLE),
];

const PANDAS_PARQUET: &str = "convert it: python3 -c \"import pandas, sys; pandas.read_parquet(sys.argv[1])\
    .to_json('rows.jsonl', orient='records', lines=True)\" FILE";
const PANDAS_FEATHER: &str = "convert it: python3 -c \"import pandas, sys; pandas.read_feather(sys.argv[1])\
    .to_json('rows.jsonl', orient='records', lines=True)\" FILE";
const PANDAS_PICKLE: &str = "convert it: python3 -c \"import pandas, sys; pandas.read_pickle(sys.argv[1])\
    .to_json('rows.jsonl', orient='records', lines=True)\" FILE";

/// Whether a zstd file begins so: with a frame of data, or with one to skip, as pzstd writes it.
fn is_zstd(sample: &[u8]) -> bool {
    sample.starts_with(ZSTD) || matches!(sample, [0x50..=0x5F, 0x2A, 0x4D, 0x18, ..])
}

/// How to write a file again as UTF-8.
pub(super) fn utf8_hint(path: &Path) -> String {
    format!(
        "save the file as UTF-8, for example: {}",
        converted("iconv -f WINDOWS-1252 -t UTF-8", path, "utf8.txt")
    )
}

/// A shell command that gives the text of `path`, decompressed, to `program`, and writes `output`.
pub(super) fn converted(program: &str, path: &Path, output: &str) -> String {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase();
    let text = match ending.as_str() {
        "gz" => "gunzip -c",
        "zst" | "zstd" => "zstd -dc",
        _ => "cat",
    };
    format!("{text} {} | {program} > {output}", argument(&path.display().to_string()))
}

/// The text of a file, and its first [`SAMPLE_BYTES`], which `input` repeats.
pub(super) struct Source<'a> {
    pub sample: Vec<u8>,
    pub input: Box<dyn Read + 'a>,
}

/// Decompresses and decodes `raw`. `noun` is what the rows are, for errors: "prompts".
///
/// # Errors
/// [`Error::Input`] for anything that is not text, or in another encoding; [`Error::Io`].
pub(super) fn open<'a>(path: &Path, noun: &str, raw: Box<dyn Read + 'a>) -> Result<Source<'a>> {
    let mut source = peek(path, raw)?;
    if let Some(decompressed) = decompress(&mut source) {
        source = peek(path, decompressed)?;
        if source.sample.starts_with(GZIP) || is_zstd(&source.sample) {
            return Err(Error::input(
                path,
                None,
                "expected text in the compressed file, found compressed data again",
            )
            .with_hint("decompress it once, for example with gunzip"));
        }
    }
    if let Some((found, hint)) = foreign(&source.sample) {
        return Err(Error::input(path, None, format!("expected a text file of {noun}, found {found}"))
            .with_hint(hint.replace("FILE", &argument(&path.display().to_string()))));
    }
    source = decode(path, source)?;
    if source.sample.contains(&0) {
        let reason = "expected text in UTF-8, found NUL bytes (UTF-16 text without a byte-order mark, or a binary \
                      file)";
        return Err(Error::input(path, None, reason).with_hint("save the file as UTF-8"));
    }
    Ok(source)
}

/// Reads the sample.
fn peek<'a>(path: &Path, mut input: Box<dyn Read + 'a>) -> Result<Source<'a>> {
    let mut sample = Vec::new();
    (&mut input).take(SAMPLE_BYTES as u64).read_to_end(&mut sample).map_err(Error::io("read", path))?;
    let input = Box::new(io::Cursor::new(sample.clone()).chain(input));
    Ok(Source { sample, input })
}

/// What a file is if it is certainly not text, and how to convert it.
fn foreign(sample: &[u8]) -> Option<(&'static str, &'static str)> {
    if sample.starts_with(b"PK\x03\x04") {
        let has = |part: &[u8]| sample.windows(part.len()).any(|window| window == part);
        return Some(match () {
            () if has(b"xl/") => ("an Excel workbook", "save it as \"CSV UTF-8\" in the spreadsheet program"),
            () if has(b"opendocument.spreadsheet") => ("a spreadsheet", "save it as CSV in UTF-8"),
            () if has(b"word/") => ("a Word document", "save it as plain text in UTF-8"),
            () => ("a zip archive", "unpack it first: unzip FILE"),
        });
    }
    if sample.get(257..262) == Some(b"ustar") {
        return Some(("a tar archive", "unpack it first: tar -xf FILE"));
    }
    let magic = FOREIGN.iter().find(|(magic, ..)| sample.starts_with(magic));
    magic.map(|&(_, found, hint)| (found, hint)).or_else(|| {
        let is_pointer = sample.starts_with(b"version https://git-lfs.github.com/spec/");
        is_pointer.then_some((
            "a Git LFS pointer instead of the file",
            "fetch the file: git lfs pull, or download it",
        ))
    })
}

fn decompress<'a>(source: &mut Source<'a>) -> Option<Box<dyn Read + 'a>> {
    let take = |source: &mut Source<'a>| std::mem::replace(&mut source.input, Box::new(io::empty()));
    if source.sample.starts_with(GZIP) {
        let input = MultiGzDecoder::new(take(source));
        return Some(Box::new(Named { input, format: "gzip" }));
    }
    if is_zstd(&source.sample) {
        let input = ZstdFrames { input: take(source), decoder: FrameDecoder::new(), is_in_frame: false };
        return Some(Box::new(Named { input, format: "zstd" }));
    }
    None
}

/// A decoder whose errors name the format.
struct Named<R> {
    input: R,
    format: &'static str,
}

impl<R: Read> Read for Named<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.input.read(buffer).map_err(|error| {
            let reason = format!("the {} data is damaged or cut off ({error})", self.format);
            io::Error::new(io::ErrorKind::InvalidData, reason)
        })
    }
}

/// The text of all frames of a zstd file, one after the other.
struct ZstdFrames<'a> {
    input: Box<dyn Read + 'a>,
    decoder: FrameDecoder,
    is_in_frame: bool,
}

impl ZstdFrames<'_> {
    /// Reads the header of the next frame; `false` at the end of the file.
    fn next_frame(&mut self) -> io::Result<bool> {
        loop {
            let mut first = [0];
            if self.input.read(&mut first)? == 0 {
                return Ok(false);
            }
            let header = io::Cursor::new(first).chain(&mut self.input);
            match self.decoder.init(header) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    io::copy(&mut (&mut self.input).take(u64::from(length)), &mut io::sink())?;
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }
}

impl Read for ZstdFrames<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.is_in_frame && !self.next_frame()? {
                return Ok(0);
            }
            self.is_in_frame = true;
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                let one = BlockDecodingStrategy::UptoBlocks(1);
                self.decoder.decode_blocks(&mut self.input, one).map_err(io::Error::other)?;
            }
            let n = self.decoder.read(buffer)?;
            if n > 0 || buffer.is_empty() {
                return Ok(n);
            }
            let stated = self.decoder.get_checksum_from_data();
            if stated.is_some() && stated != self.decoder.get_calculated_checksum() {
                return Err(io::Error::other("wrong checksum"));
            }
            self.is_in_frame = false;
        }
    }
}

/// Removes a byte-order mark, and decodes UTF-16 that has one.
fn decode<'a>(path: &Path, mut source: Source<'a>) -> Result<Source<'a>> {
    let sample = &source.sample;
    if sample.starts_with(b"\xFF\xFE\0\0") || sample.starts_with(b"\0\0\xFE\xFF") {
        return Err(Error::input(path, None, "expected UTF-8, found UTF-32").with_hint(format!(
            "save the file as UTF-8: {}",
            converted("iconv -f UTF-32 -t UTF-8", path, "utf8.txt")
        )));
    }
    let is_big = sample.starts_with(b"\xFE\xFF");
    if is_big || sample.starts_with(b"\xFF\xFE") {
        let mut input = source.input;
        input.read_exact(&mut [0; 2]).map_err(Error::io("read", path))?;
        return peek(path, Box::new(Utf16 { input, is_big, rest: Vec::new(), ready: Vec::new(), at: 0 }));
    }
    if sample.starts_with(b"\xEF\xBB\xBF") {
        source.input.read_exact(&mut [0; 3]).map_err(Error::io("read", path))?;
        // Again, so that the sample is full unless it is the whole text.
        return peek(path, source.input);
    }
    Ok(source)
}

/// UTF-16 as UTF-8. Unpaired surrogates become U+FFFD.
struct Utf16<R> {
    input: R,
    is_big: bool,
    /// Bytes that do not make a whole character yet.
    rest: Vec<u8>,
    ready: Vec<u8>,
    at: usize,
}

impl<R: Read> Utf16<R> {
    /// Decodes the next chunk; `false` at the end.
    fn fill(&mut self) -> io::Result<bool> {
        let n_before = self.rest.len();
        let mut chunk = [0; 8192];
        let n = self.input.read(&mut chunk)?;
        self.rest.extend_from_slice(&chunk[..n]);
        let is_end = n == 0;
        if is_end && n_before == 0 {
            return Ok(false);
        }
        if is_end && self.rest.len() % 2 == 1 {
            let reason = "the UTF-16 text is cut off in the middle of a character";
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        let unit = |pair: &[u8]| match self.is_big {
            true => u16::from_be_bytes([pair[0], pair[1]]),
            false => u16::from_le_bytes([pair[0], pair[1]]),
        };
        let mut units: Vec<u16> = self.rest.chunks_exact(2).map(unit).collect();
        // A high surrogate at the end waits for its other half.
        let is_half = units.last().is_some_and(|unit| (0xD800..0xDC00).contains(unit)) && !is_end;
        units.truncate(units.len() - usize::from(is_half));
        self.rest.drain(..2 * units.len());
        self.ready = String::from_utf16_lossy(&units).into_bytes();
        self.at = 0;
        Ok(true)
    }
}

impl<R: Read> Read for Utf16<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.ready.len() {
            if !self.fill()? {
                return Ok(0);
            }
        }
        let n = buffer.len().min(self.ready.len() - self.at);
        buffer[..n].copy_from_slice(&self.ready[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read(bytes: &[u8]) -> Result<Vec<u8>> {
        let path = Path::new("f");
        let mut source = open(path, "prompts", Box::new(bytes))?;
        let mut text = Vec::new();
        source.input.read_to_end(&mut text).map_err(Error::io("read", path))?;
        assert!(text.starts_with(&source.sample));
        Ok(text)
    }

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(text: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(text, ruzstd::encoding::CompressionLevel::Fastest)
    }

    #[test]
    fn gzip_and_zstd_with_several_members_and_utf_16_give_the_same_text() {
        let text = "größer 🎉\n".repeat(20_000);
        let (first, second) = text.as_bytes().split_at(text.len() / 2 + 1);
        assert!(read(&[gzip(first), gzip(second)].concat()).unwrap() == text.as_bytes());
        assert!(read(&[zstd(first), zstd(second)].concat()).unwrap() == text.as_bytes());
        let units: Vec<u16> = std::iter::once(0xFEFF).chain(text.encode_utf16()).collect();
        let little: Vec<u8> = units.iter().flat_map(|unit| unit.to_le_bytes()).collect();
        let big: Vec<u8> = units.iter().flat_map(|unit| unit.to_be_bytes()).collect();
        for bytes in [little.clone(), big, gzip(&little), gzip(format!("\u{feff}{text}").as_bytes())] {
            assert!(read(&bytes).unwrap() == text.as_bytes());
        }
    }

    #[test]
    fn rejects_damaged_compressed_text_in_words() {
        for whole in [gzip(&b"some text ".repeat(9000)), zstd(&b"some text ".repeat(9000))] {
            let error = read(&whole[..whole.len() - 6]).unwrap_err().to_string();
            assert!(error.contains("data is damaged or cut off"), "{error}");
        }
        assert!(read(&gzip(&gzip(b"text"))).unwrap_err().to_string().contains("compressed data again"));
    }

    #[test]
    fn rejects_files_that_are_no_text_by_their_kind() {
        for (bytes, found) in [
            (&b"PAR1\x15"[..], "a Parquet file"),
            (b"PK\x03\x04....xl/workbook.xml", "an Excel workbook"),
            (b"PK\x03\x04....", "a zip archive"),
            (b"GGUF\x03\0", "a GGUF model"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
            (b"a\0b", "NUL bytes"),
            (b"\xFF\xFE\0\0a\0\0\0", "UTF-32"),
        ] {
            let error = read(bytes).unwrap_err();
            assert!(error.to_string().contains(found) && error.hint().is_some(), "{error}");
        }
    }
}
