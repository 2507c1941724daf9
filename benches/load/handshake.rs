//! Fixed newstyle negotiation up to an open export.

use std::{
    fs::File,
    io::{Read, Write},
};

use anyhow::{Context, Result, ensure};

use super::replies::{be16, be32, be64};

const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERROR: u32 = 1 << 31;

/// Negotiates and opens an export; returns its size in bytes.
pub(super) fn handshake(mut stream: &File, export: &str, structured: bool) -> Result<u64> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    ensure!(greeting.starts_with(b"NBDMAGICIHAVEOPT"), "not a newstyle NBD server");
    let offered = u32::from(be16(&greeting[16..]));
    stream.write_all(&(offered & 3).to_be_bytes())?;
    if structured {
        let (kind, _) = option(stream, OPT_STRUCTURED_REPLY, &[])?;
        ensure!(kind == REP_ACK, "no structured replies");
    }
    // The name, and no wishes for further information.
    let request = [&(export.len() as u32).to_be_bytes()[..], export.as_bytes(), &[0; 2]].concat();
    let mut size = None;
    let (mut kind, mut data) = option(stream, OPT_GO, &request)?;
    while kind != REP_ACK {
        if kind == REP_INFO && data.len() >= 12 && be16(&data[..2]) == 0 {
            size = Some(be64(&data[2..10]));
        }
        (kind, data) = option_reply(stream)?;
    }
    size.context("the server did not tell the size")
}

fn option(mut stream: &File, option: u32, data: &[u8]) -> Result<(u32, Vec<u8>)> {
    let mut request = b"IHAVEOPT".to_vec();
    request.extend_from_slice(&option.to_be_bytes());
    request.extend_from_slice(&(data.len() as u32).to_be_bytes());
    request.extend_from_slice(data);
    stream.write_all(&request)?;
    option_reply(stream)
}

fn option_reply(mut stream: &File) -> Result<(u32, Vec<u8>)> {
    let mut header = [0; 20];
    stream.read_exact(&mut header)?;
    let (kind, length) = (be32(&header[12..16]), be32(&header[16..20]) as usize);
    ensure!(length <= 64 << 10, "an option reply of {length} bytes");
    let mut data = vec![0; length];
    stream.read_exact(&mut data)?;
    ensure!(kind & REP_ERROR == 0, "refused: {}", String::from_utf8_lossy(&data));
    Ok((kind, data))
}
