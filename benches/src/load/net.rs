//! The guest's side of `nacelle-bench net`: the first process of a guest that has a network interface.
//! It connects to the bench and moves bytes over that connection as the bench asks for:
//!
//! | line of the bench | then |
//! |---|---|
//! | `out N` | the guest sends N bytes |
//! | `in N` | the bench sends N bytes, which the guest answers with one |
//! | `ping N` | N times, the bench sends a byte and the guest answers it |
//! | `interrupts` | the guest sends its /proc/interrupts and an empty line |
#![allow(unsafe_code)] // ioctls of an interface's address and state

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::os::fd::AsRawFd;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

const INTERFACE: &str = "eth0";
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 98, 0, 2);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
const BENCH: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 98, 0, 1), 5201);
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
const BLOCK: usize = 128 << 10;

/// Whether the guest has an interface, and no share.
pub fn wanted() -> bool {
    fs::exists(format!("/sys/class/net/{INTERFACE}")).unwrap_or(false)
}

pub fn serve() -> Result<()> {
    configure().context("configuring the interface")?;
    let stream = connect()?;
    stream.set_nodelay(true)?;
    let mut output = stream.try_clone()?;
    let mut input = BufReader::with_capacity(BLOCK, stream);
    let block = vec![0x5a; BLOCK];
    loop {
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let (what, count) = line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "0"));
        let mut rest: usize = count.parse()?;
        match what {
            "out" => {
                while rest > 0 {
                    let part = rest.min(block.len());
                    output.write_all(&block[..part])?;
                    rest -= part;
                }
            }
            "in" => {
                std::io::copy(&mut input.by_ref().take(rest as u64), &mut std::io::sink())?;
                output.write_all(&[1])?;
            }
            "ping" => {
                let mut byte = [0];
                for _ in 0..rest {
                    input.read_exact(&mut byte)?;
                    output.write_all(&byte)?;
                }
            }
            "interrupts" => {
                let table = fs::read_to_string("/proc/interrupts")?;
                output.write_all(format!("{}\n\n", table.trim_end()).as_bytes())?;
            }
            other => bail!("no request {other:?}"),
        }
    }
}

fn connect() -> Result<TcpStream> {
    let begin = Instant::now();
    loop {
        match TcpStream::connect_timeout(&BENCH.into(), Duration::from_secs(1)) {
            Ok(stream) => return Ok(stream),
            Err(error) if begin.elapsed() > CONNECT_LIMIT => return Err(error.into()),
            Err(_) => sleep(Duration::from_millis(50)),
        }
    }
}

/// Sets address and mask, and brings the interface up.
fn configure() -> Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let address = |address: Ipv4Addr| {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        bytes[4..8].copy_from_slice(&address.octets());
        bytes
    };
    let mut flags = [0; 16];
    flags[..2].copy_from_slice(&((libc::IFF_UP | libc::IFF_RUNNING) as u16).to_ne_bytes());
    for (request, value) in [
        (libc::SIOCSIFADDR, address(GUEST)),
        (libc::SIOCSIFNETMASK, address(MASK)),
        (libc::SIOCSIFFLAGS, flags),
    ] {
        // `struct ifreq`: a name of 16 bytes and a union of 24.
        let mut ifreq = [0u8; 40];
        ifreq[..INTERFACE.len()].copy_from_slice(INTERFACE.as_bytes());
        ifreq[16..32].copy_from_slice(&value);
        // SAFETY: these requests read one `struct ifreq`, and the array has its size.
        if unsafe { libc::ioctl(socket.as_raw_fd(), request as libc::Ioctl, ifreq.as_ptr()) } < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
    }
    Ok(())
}
