//! Recognises by its first bytes what a file is when it is not safetensors, so that the error can say so.

/// A first piece of a file, what such a file is, and what to do about it.
const KINDS: [(&[u8], &str); 15] = [
    (b"version https://git-lfs", "a Git LFS pointer, not the weights; fetch them with `git lfs pull`"),
    (b"<!DOCTYPE", "an HTML page, not weights; the download went wrong, fetch the file again"),
    (b"<!doctype", "an HTML page, not weights; the download went wrong, fetch the file again"),
    (b"<html", "an HTML page, not weights; the download went wrong, fetch the file again"),
    (b"<HTML", "an HTML page, not weights; the download went wrong, fetch the file again"),
    (b"<?xml", "an XML text (an error message of a server?), not weights; fetch the file again"),
    (b"{\"", "a JSON text (an error message of a server?), not weights; fetch the file again"),
    (b"PK\x03\x04", "a zip archive, most likely saved by torch.save; convert it to safetensors first"),
    (b"\x80\x02", "a pickle, most likely saved by torch.save; convert it to safetensors first"),
    (b"\x80\x03", "a pickle; convert it to safetensors first"),
    (b"\x80\x04", "a pickle; convert it to safetensors first"),
    (b"\x80\x05", "a pickle; convert it to safetensors first"),
    (b"\x1f\x8b\x08", "a gzip archive; unpack it first"),
    (b"GGUF", "a GGUF file; fastft reads safetensors"),
    (b"\x89HDF", "an HDF5 file; fastft reads safetensors"),
];

/// What a file that starts with `first` is, if it is a known kind other than safetensors.
pub fn recognise(first: &[u8]) -> Option<&'static str> {
    KINDS.iter().find(|(magic, _)| first.starts_with(magic)).map(|(_, kind)| *kind)
}
