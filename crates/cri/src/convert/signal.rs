//! Stop signals: CRI's enum and the image config's text, to and from numbers (x86-64, signal(7)).

use super::{Refusal, known};
use crate::v1;

const SIGTERM: u32 = 15;
const SIGRTMIN: u32 = 34;
const SIGRTMAX: u32 = 64;

/// Names without `SIG`. Where a number has two, the one to give back stands first.
const NAMES: [(&str, u32); 35] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", SIGTERM),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("UNUSED", 31),
];

/// `SIGTERM`, `term`, `15`, `SIGRTMIN+3`, `RTMAX-1`.
pub fn parse(text: &str) -> Option<u32> {
    let upper = text.trim().to_ascii_uppercase();
    if let Ok(number) = upper.parse::<u32>() {
        return (1..=SIGRTMAX).contains(&number).then_some(number);
    }
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(rest) = name.strip_prefix("RTMIN") {
        let offset =
            if rest.is_empty() { 0 } else { rest.strip_prefix('+')?.parse::<u32>().ok()? };
        return SIGRTMIN.checked_add(offset).filter(|n| *n <= SIGRTMAX);
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        let offset =
            if rest.is_empty() { 0 } else { rest.strip_prefix('-')?.parse::<u32>().ok()? };
        return SIGRTMAX.checked_sub(offset).filter(|n| *n >= SIGRTMIN);
    }
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

/// The signal that ends a container: the request's, else the image's, else SIGTERM.
pub fn stop_signal(requested: i32, image: Option<&str>) -> Result<u32, Refusal> {
    let signal: v1::Signal = known("stop_signal", requested)?;
    if signal != v1::Signal::RuntimeDefault {
        return number(signal)
            .ok_or_else(|| Refusal::invalid("stop_signal", "no such signal on Linux"));
    }
    match image {
        None | Some("") => Ok(SIGTERM),
        Some(text) => parse(text).ok_or_else(|| {
            Refusal::invalid("image", format!("its stop signal {text:?} is none that Linux has"))
        }),
    }
}

/// `SIGNAL_SIGRTMINPLUS3` and its like carry the name after `SIGNAL_`.
fn number(signal: v1::Signal) -> Option<u32> {
    let name = signal.as_str_name().strip_prefix("SIGNAL_")?;
    parse(&name.replace("PLUS", "+").replace("MINUS", "-"))
}

pub fn to_cri(signal: u32) -> v1::Signal {
    let name = match signal {
        SIGRTMIN => "SIGNAL_SIGRTMIN".to_string(),
        SIGRTMAX => "SIGNAL_SIGRTMAX".to_string(),
        // The interface splits the range as `kill -l` does: 15 above RTMIN, 14 below RTMAX.
        35..=49 => format!("SIGNAL_SIGRTMINPLUS{}", signal - SIGRTMIN),
        50..=63 => format!("SIGNAL_SIGRTMAXMINUS{}", SIGRTMAX - signal),
        _ => NAMES
            .iter()
            .find(|(_, number)| *number == signal)
            .map_or(String::new(), |(name, _)| format!("SIGNAL_SIG{name}")),
    };
    v1::Signal::from_str_name(&name).unwrap_or(v1::Signal::RuntimeDefault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_converts_to_cri_and_back() {
        for number in 1..=SIGRTMAX {
            if number == 32 || number == 33 {
                continue; // used by the C library, not in the interface
            }
            let signal = to_cri(number);
            assert_ne!(signal, v1::Signal::RuntimeDefault, "{number}");
            assert_eq!(stop_signal(signal as i32, None), Ok(number));
        }
    }

    #[test]
    fn an_image_names_its_signal_in_many_ways() {
        for (text, number) in
            [("SIGQUIT", 3), ("quit", 3), ("9", 9), ("SIGRTMIN+3", 37), ("RTMAX-1", 63)]
        {
            assert_eq!(stop_signal(0, Some(text)), Ok(number), "{text}");
        }
        for text in ["SIGNONE", "0", "65", "RTMIN+99", "-1"] {
            assert!(stop_signal(0, Some(text)).is_err(), "{text}");
        }
    }

    #[test]
    fn the_request_beats_the_image_and_both_beat_the_default() {
        assert_eq!(stop_signal(v1::Signal::Sigint as i32, Some("QUIT")), Ok(2));
        assert_eq!(stop_signal(0, None), Ok(15));
        assert!(stop_signal(4711, None).is_err());
    }
}
