//! Attachments: made once, pinned, later swapped to a new program without a moment in between.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttach, TcError, TcHandle};
use aya::programs::xdp::XdpLink;
use aya::programs::{
    CgroupAttachMode, CgroupSockAddr, LinkOrder, Program, ProgramError, SchedClassifier, TcAttachType,
    XdpMode,
};
use aya::sys::{NetlinkError, SyscallError};

use super::{Causes, Datapath, DatapathError, netkit};
use crate::config::{Attach, Xdp};

/// Whose interface it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Interface {
    /// The host's end of a pod's.
    Pod,
    /// One of the node's own.
    Device,
    /// The one that carries packets to other nodes.
    Tunnel,
}

impl Interface {
    pub(crate) const ALL: [Self; 3] = [Self::Pod, Self::Device, Self::Tunnel];

    /// Its programs: what a pod sends is the host's ingress.
    pub(crate) const fn programs(self) -> [(&'static str, TcAttachType); 2] {
        match self {
            Self::Pod => [("pod_egress", TcAttachType::Ingress), ("pod_ingress", TcAttachType::Egress)],
            Self::Device => {
                [("device_ingress", TcAttachType::Ingress), ("device_egress", TcAttachType::Egress)]
            }
            Self::Tunnel => {
                [("tunnel_egress", TcAttachType::Egress), ("tunnel_ingress", TcAttachType::Ingress)]
            }
        }
    }
}

/// The program in a device's driver.
const XDP: &str = "device_xdp";

/// Where `pod_egress` is pinned that runs in the transmission of a pod.
const TRANSMISSION: &str = "pod_transmission";

const SOCKET: [&str; 8] =
    ["connect4", "connect6", "getpeername4", "getpeername6", "sendmsg4", "sendmsg6", "recvmsg4", "recvmsg6"];

/// Whether something had to be made, or was there and has the programs of this agent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attached {
    Anew,
    Kept,
}

/// One fixed place for our filter on a clsact qdisc, so that the next agent finds and replaces it.
pub(crate) const FILTER: NlOptions = NlOptions { priority: 1, handle: TcHandle::new(0, 1), classid: None };

/// Loads one program.
///
/// # Errors
/// What the kernel refuses, with the verifier's words.
pub fn load(program: &mut Program) -> Result<(), ProgramError> {
    if let Program::SchedClassifier(program) = program {
        return program.load();
    }
    if let Program::Xdp(program) = program {
        return program.load();
    }
    <&mut CgroupSockAddr>::try_from(program)?.load()
}

impl Datapath {
    /// Attaches the socket programs to a cgroup.
    ///
    /// # Errors
    /// What the kernel refuses, with the cgroup.
    pub fn attach_cgroup(&mut self, cgroup: &Path) -> Result<(), DatapathError> {
        self.cgroup = Some(cgroup.to_owned());
        self.ensure_cgroup().map(drop)
    }

    /// The same; says which programs were not attached.
    pub(super) fn ensure_cgroup(&mut self) -> Result<Vec<&'static str>, DatapathError> {
        let mut made = Vec::new();
        let Some(cgroup) = self.cgroup.clone() else { return Ok(made) };
        for hook in SOCKET {
            let pin = self.options.bpffs.links().join(hook);
            if self.attach_socket(hook, &cgroup, &pin)? == Attached::Anew {
                made.push(hook);
            }
        }
        Ok(made)
    }

    fn attach_socket(
        &mut self,
        hook: &'static str,
        cgroup: &Path,
        pin: &Path,
    ) -> Result<Attached, DatapathError> {
        let place = || format!("{hook} on {}", cgroup.display());
        let attach_error = |source| DatapathError::Attach { place: place(), source };
        let program = self.ebpf.program_mut(hook).ok_or(DatapathError::NoProgram { name: hook })?;
        let program = <&mut CgroupSockAddr>::try_from(program).map_err(attach_error)?;
        if let Some(link) = pinned(pin)? {
            let link =
                link.try_into().map_err(|source| DatapathError::Link { path: pin.to_owned(), source })?;
            match program.attach_to_link(link) {
                Ok(id) => {
                    // The pin keeps the link; only this process lets go of it.
                    program.take_link(id).map_err(attach_error)?;
                    return Ok(Attached::Kept);
                }
                Err(error) if is_gone(&error) => remove(pin)?,
                Err(error) => return Err(attach_error(error)),
            }
        }
        let file =
            File::open(cgroup).map_err(|source| DatapathError::Io { path: cgroup.to_owned(), source })?;
        let id = program.attach(file, CgroupAttachMode::Single).map_err(attach_error)?;
        let link = program.take_link(id).map_err(attach_error)?;
        let link =
            FdLink::try_from(link).map_err(|source| DatapathError::Link { path: pin.to_owned(), source })?;
        keep(link, pin)
    }

    /// Attaches the programs of its kind to an interface.
    ///
    /// # Errors
    /// What the kernel refuses, with the interface.
    pub fn attach(&mut self, kind: Interface, ifindex: u32) -> Result<(), DatapathError> {
        self.ensure(kind, ifindex).map(drop)
    }

    /// The same; says which programs were not attached.
    pub(super) fn ensure(
        &mut self,
        kind: Interface,
        ifindex: u32,
    ) -> Result<Vec<&'static str>, DatapathError> {
        let mut made = Vec::new();
        for (name, hook) in kind.programs() {
            let pin = self.pin(name, ifindex);
            let program = self.ebpf.program_mut(name).ok_or(DatapathError::NoProgram { name })?;
            let error =
                |source| DatapathError::Attach { place: format!("{name} on interface {ifindex}"), source };
            let program = <&mut SchedClassifier>::try_from(program).map_err(error)?;
            if self.options.attach != Attach::Clsact {
                match attach_tcx(program, ifindex, hook, &pin) {
                    Err(DatapathError::Attach { source, .. })
                        if self.options.attach == Attach::Auto && is_unsupported(&source) =>
                    {
                        tracing::info!("this kernel has no tcx: attaching to clsact");
                        self.options.attach = Attach::Clsact;
                    }
                    other => {
                        made.extend((other? == Attached::Anew).then_some(name));
                        continue;
                    }
                }
            }
            let attached = attach_clsact(program, ifindex, hook).map_err(error)?;
            made.extend((attached == Attached::Anew).then_some(name));
        }
        let (name, early) = match kind {
            Interface::Pod => (TRANSMISSION, self.attach_transmission(ifindex)?),
            Interface::Device => (XDP, self.attach_xdp(ifindex)?),
            Interface::Tunnel => return Ok(made),
        };
        made.extend((early == Attached::Anew).then_some(name));
        Ok(made)
    }

    /// Puts the program for what a pod sends into the pod's transmission, where its device is a netkit.
    fn attach_transmission(&mut self, ifindex: u32) -> Result<Attached, DatapathError> {
        if self.plain.contains(&ifindex) {
            return Ok(Attached::Kept);
        }
        let pin = self.pin(TRANSMISSION, ifindex);
        let [(name, _), _] = Interface::Pod.programs();
        let error = |source| DatapathError::Attach {
            place: format!("{name} in the transmission of {ifindex}"),
            source,
        };
        let refused = |call| move |io_error| error(SyscallError { call, io_error }.into());
        let program = self.ebpf.program_mut(name).ok_or(DatapathError::NoProgram { name })?;
        let program = <&mut SchedClassifier>::try_from(program).map_err(error)?.fd().map_err(error)?.as_fd();
        if let Some(link) = netkit::Link::open(&pin).map_err(refused("BPF_OBJ_GET"))? {
            match link.update(program) {
                Err(gone) if gone.raw_os_error() == Some(libc::ENOLINK) => remove(&pin)?,
                done => return done.map(|()| Attached::Kept).map_err(refused("BPF_LINK_UPDATE")),
            }
        }
        match netkit::Link::create(program, ifindex) {
            Err(refusal) if is_no_netkit(&refusal) => {
                self.plain.insert(ifindex);
                Ok(Attached::Kept)
            }
            link => {
                link.map_err(refused("BPF_LINK_CREATE"))?.pin(&pin).map_err(refused("BPF_OBJ_PIN"))?;
                Ok(Attached::Anew)
            }
        }
    }

    /// Puts the program into the device's driver where the options ask for it, and takes it out where they do not.
    fn attach_xdp(&mut self, ifindex: u32) -> Result<Attached, DatapathError> {
        let pin = self.pin(XDP, ifindex);
        if self.options.xdp == Xdp::Off {
            remove(&pin)?;
            return Ok(Attached::Kept);
        }
        let program = self.ebpf.program_mut(XDP).ok_or(DatapathError::NoProgram { name: XDP })?;
        let error = |source| DatapathError::Attach { place: format!("{XDP} on interface {ifindex}"), source };
        let link_error = |source| DatapathError::Link { path: pin.clone(), source };
        let program = <&mut aya::programs::Xdp>::try_from(program).map_err(error)?;
        if let Some(link) = pinned(&pin)? {
            match program.attach_to_link(XdpLink::try_from(link).map_err(link_error)?) {
                Ok(id) => {
                    program.take_link(id).map_err(error)?;
                    return Ok(Attached::Kept);
                }
                Err(source) if is_gone(&source) => remove(&pin)?,
                Err(source) => return Err(error(source)),
            }
        }
        match program.attach(ifindex, XdpMode::Driver) {
            Ok(id) => {
                let link = program.take_link(id).map_err(error)?;
                keep(FdLink::try_from(link).map_err(link_error)?, &pin)
            }
            Err(source) if self.options.xdp == Xdp::BestEffort => {
                tracing::debug!(ifindex, "no XDP in the driver of this device: {}", Causes(&source));
                Ok(Attached::Kept)
            }
            Err(source) => Err(error(source)),
        }
    }

    /// Removes what is pinned for an interface that is no longer of this kind.
    ///
    /// # Errors
    /// [`DatapathError::Io`] where the pin cannot be removed.
    pub fn detach(&mut self, kind: Interface, ifindex: u32) -> Result<(), DatapathError> {
        let early: &[&str] = match kind {
            Interface::Pod => &[TRANSMISSION],
            Interface::Device => &[XDP],
            Interface::Tunnel => &[],
        };
        self.plain.remove(&ifindex);
        let programs = kind.programs();
        let names = programs.iter().map(|(name, _hook)| name).chain(early);
        names.into_iter().try_for_each(|name| remove(&self.pin(name, ifindex)))
    }

    /// The interfaces that an earlier agent pinned programs for.
    ///
    /// # Errors
    /// [`DatapathError::Io`] where the directory cannot be read.
    pub fn pinned(&self) -> Result<Vec<(Interface, u32)>, DatapathError> {
        let dir = self.options.bpffs.links();
        let entries = fs::read_dir(&dir).map_err(|source| DatapathError::Io { path: dir.clone(), source })?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.filter_map(|name| pinned_for(&name)).collect())
    }

    fn pin(&self, program: &str, ifindex: u32) -> PathBuf {
        self.options.bpffs.links().join(format!("{program}-{ifindex}"))
    }
}

/// What the pin of an interface's first program is for.
fn pinned_for(name: &str) -> Option<(Interface, u32)> {
    let (program, ifindex) = name.rsplit_once('-')?;
    let kind = Interface::ALL.into_iter().find(|kind| kind.programs()[0].0 == program)?;
    Some((kind, ifindex.parse().ok()?))
}

fn attach_tcx(
    program: &mut SchedClassifier,
    ifindex: u32,
    hook: TcAttachType,
    pin: &Path,
) -> Result<Attached, DatapathError> {
    let place = format!("{} on interface {ifindex}", pin.display());
    let error = |source| DatapathError::Attach { place: place.clone(), source };
    let link_error = |source| DatapathError::Link { path: pin.to_owned(), source };
    if let Some(link) = pinned(pin)? {
        match program.attach_to_link(SchedClassifierLink::try_from(link).map_err(link_error)?) {
            Ok(id) => {
                program.take_link(id).map_err(error)?;
                return Ok(Attached::Kept);
            }
            Err(source) if is_gone(&source) => remove(pin)?,
            Err(source) => return Err(error(source)),
        }
    }
    let attach = TcAttach::Tcx { attach_type: hook, order: LinkOrder::default() };
    let id = program.attach(ifindex, attach).map_err(error)?;
    let link = program.take_link(id).map_err(error)?;
    keep(FdLink::try_from(link).map_err(link_error)?, pin)
}

fn attach_clsact(
    program: &mut SchedClassifier,
    ifindex: u32,
    hook: TcAttachType,
) -> Result<Attached, ProgramError> {
    match tc::qdisc_add_clsact(ifindex) {
        Err(TcError::NetlinkError(error)) if raw_error(&error) != Some(libc::EEXIST) => {
            return Err(ProgramError::TcError(TcError::NetlinkError(error)));
        }
        // It is there, now or already.
        _ => {}
    }
    let attach = TcAttach::Netlink { parent: hook.into(), options: FILTER };
    let mut attached = Attached::Anew;
    let id = match program.attach(ifindex, attach) {
        Err(ProgramError::TcError(TcError::NetlinkError(error)))
            if raw_error(&error) == Some(libc::EEXIST) =>
        {
            let NlOptions { priority, handle, classid } = FILTER;
            let former = SchedClassifierLink::attached(ifindex, hook.into(), priority, handle, classid)?;
            attached = Attached::Kept;
            program.attach_to_link(former)
        }
        other => other,
    }?;
    // The filter stays when the agent goes: dropping the link would remove it.
    std::mem::forget(program.take_link(id)?);
    Ok(attached)
}

fn pinned(pin: &Path) -> Result<Option<FdLink>, DatapathError> {
    match PinnedLink::from_pin(pin) {
        Ok(link) => Ok(Some(link.into())),
        Err(LinkError::SyscallError(SyscallError { io_error, .. }))
            if io_error.kind() == io::ErrorKind::NotFound =>
        {
            Ok(None)
        }
        Err(source) => Err(DatapathError::Link { path: pin.to_owned(), source }),
    }
}

fn keep(link: FdLink, pin: &Path) -> Result<Attached, DatapathError> {
    link.pin(pin)
        .map(|_| Attached::Anew)
        .map_err(|source| DatapathError::Pin { path: pin.to_owned(), source })
}

pub(super) fn remove(pin: &Path) -> Result<(), DatapathError> {
    match fs::remove_file(pin) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(DatapathError::Io { path: pin.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// The link's device or cgroup went away: the kernel keeps an empty link as long as it is pinned.
fn is_gone(error: &ProgramError) -> bool {
    syscall_error(error) == Some(libc::ENOLINK)
}

/// What the kernel says of an interface that is another device, and one without netkit (before 6.7) of every interface.
fn is_no_netkit(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENXIO | libc::EINVAL))
}

/// What kernels before 6.6 say to a tcx attachment.
fn is_unsupported(error: &ProgramError) -> bool {
    syscall_error(error) == Some(libc::EINVAL)
}

fn syscall_error(error: &ProgramError) -> Option<i32> {
    if let ProgramError::SyscallError(SyscallError { io_error, .. }) = error {
        return io_error.raw_os_error();
    }
    None
}

fn raw_error(error: &NetlinkError) -> Option<i32> {
    error.raw_os_error()
}
