//! Loaded programs as the kernel has them. What they were loaded from, instructions with types and lines, takes
//! megabytes and is needed once.

use std::fs;
use std::path::Path;

use aya::pin::PinError;
use aya::programs::cgroup_sock_addr::CgroupSockAddrAttachType as Hook;
use aya::programs::{CgroupSockAddr, Program, ProgramError, SchedClassifier};

use super::DatapathError;

/// Puts a handle of the loaded program in the place of what it was loaded from. Only a pin gives such a handle: it is
/// at `pin` for a moment.
///
/// # Errors
/// What the kernel refuses.
pub(super) fn keep(name: &str, program: &mut Program, pin: &Path) -> Result<(), DatapathError> {
    // An agent that was killed here may have left it.
    super::attach::remove(pin)?;
    program.pin(pin).map_err(|source: PinError| DatapathError::Pin { path: pin.to_owned(), source })?;
    let handle = open(name, program, pin);
    fs::remove_file(pin).map_err(|source| DatapathError::Io { path: pin.to_owned(), source })?;
    let handle = handle.map_err(|source| DatapathError::Program { name: name.to_owned(), source })?;
    if let Some(handle) = handle {
        *program = handle;
    }
    Ok(())
}

/// `None` of the XDP program: it stays as it was loaded, and is small.
fn open(name: &str, program: &Program, pin: &Path) -> Result<Option<Program>, ProgramError> {
    if let Program::SchedClassifier(_) = program {
        return Ok(Some(Program::SchedClassifier(SchedClassifier::from_pin(pin)?)));
    }
    let Some((_, hook)) = HOOKS.iter().find(|(hook, _)| *hook == name) else { return Ok(None) };
    Ok(Some(Program::CgroupSockAddr(CgroupSockAddr::from_pin(pin, *hook)?)))
}

const HOOKS: [(&str, Hook); 8] = [
    ("connect4", Hook::Connect4),
    ("connect6", Hook::Connect6),
    ("getpeername4", Hook::GetPeerName4),
    ("getpeername6", Hook::GetPeerName6),
    ("sendmsg4", Hook::UDPSendMsg4),
    ("sendmsg6", Hook::UDPSendMsg6),
    ("recvmsg4", Hook::UDPRecvMsg4),
    ("recvmsg6", Hook::UDPRecvMsg6),
];
