//! What is ours in the kernel's network, by netlink, in the network namespace that this runs in.

use aya::programs::links::Link as _;
use aya::programs::tc::{NlOptions, SchedClassifierLink};
use aya::programs::{ProgramError, TcAttachType};
use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};
use rtnetlink::{Error, Handle};

use super::RemoveError;
use crate::datapath::{FILTER, Interface};
use crate::node::links::{self, Link, Role, in_session};

/// A filter of ours on a clsact qdisc.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    pub link: Link,
    /// Its program's name.
    pub program: String,
    hook: Hook,
}

/// [`TcAttachType`] cannot be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hook {
    Ingress,
    Egress,
}

#[derive(Default)]
pub(super) struct Found {
    pub(super) filters: Vec<Filter>,
    pub(super) qdiscs: Vec<Link>,
    pub(super) links: Vec<Link>,
}

pub(super) fn find() -> Result<Found, RemoveError> {
    let seen = links::all()?;
    let found = in_session("list filters", async |handle| {
        let mut found = Found::default();
        for seen in seen {
            let link = seen.link;
            if seen.role == Role::OurPod {
                // Its filters go with it.
                found.links.push(link);
                continue;
            }
            let (ours, others) = filters(&handle, &link).await;
            if !ours.is_empty() && others == 0 {
                found.qdiscs.push(link);
            }
            found.filters.extend(ours);
        }
        Ok(found)
    })?;
    Ok(found)
}

/// Our filters on a link's clsact qdisc, and how many others are there.
async fn filters(handle: &Handle, link: &Link) -> (Vec<Filter>, usize) {
    let (mut ours, mut others) = (Vec::new(), 0);
    for hook in [Hook::Ingress, Hook::Egress] {
        let mut requests = handle.traffic_filter(signed(link));
        let request = match hook {
            Hook::Ingress => requests.get().ingress(),
            Hook::Egress => requests.get().egress(),
        };
        let mut messages = Box::pin(request.execute());
        // A link without the qdisc answers with an error.
        while let Ok(Some(message)) = messages.try_next().await {
            // The kernel also lists the priority itself, with handle 0.
            if message.header.handle == TcHandle::UNSPEC {
                continue;
            }
            match program(&message) {
                Some(program) => ours.push(Filter { link: link.clone(), program, hook }),
                None => others += 1,
            }
        }
    }
    (ours, others)
}

/// The program's name, of a filter that has our place and one of our names.
fn program(message: &TcMessage) -> Option<String> {
    let NlOptions { priority, handle, classid: _ } = FILTER;
    let header = &message.header;
    let here = header.info >> 16 == u32::from(priority) && header.handle == TcHandle::from(u32::from(handle));
    let mut name = None;
    for attribute in &message.attributes {
        let TcAttribute::Options(options) = attribute else { continue };
        for option in options {
            if let TcOption::Bpf(TcFilterBpfOption::ProgName(text)) = option {
                name = Some(text.trim_end_matches('\0').to_owned());
            }
        }
    }
    let name = name?;
    let ours = Interface::ALL.iter().flat_map(|kind| kind.programs()).any(|(program, _)| program == name);
    (here && ours).then_some(name)
}

pub(super) fn remove_filter(filter: &Filter) -> Result<(), RemoveError> {
    let hook = match filter.hook {
        Hook::Ingress => TcAttachType::Ingress,
        Hook::Egress => TcAttachType::Egress,
    };
    let NlOptions { priority, handle, classid } = FILTER;
    let failed = |source| RemoveError::Filter {
        program: filter.program.clone(),
        link: filter.link.name.clone(),
        source: Box::new(source),
    };
    let link = SchedClassifierLink::attached(filter.link.index, hook.into(), priority, handle, classid);
    link.map_err(|error| failed(ProgramError::IOError(error)))?.detach().map_err(failed)
}

pub(super) fn remove_qdisc(link: &Link) -> Result<(), RemoveError> {
    let removed = in_session(&format!("remove the clsact qdisc of {}", link.name), async |handle| {
        let mut request = handle.qdisc().del(signed(link));
        let header = &mut request.message_mut().header;
        header.parent = TcHandle::CLSACT;
        header.handle = TcHandle { major: u16::MAX, minor: 0 };
        request.execute().await
    });
    Ok(removed?)
}

pub(super) fn remove_link(link: &Link) -> Result<(), RemoveError> {
    let removed = in_session(&format!("remove the link {}", link.name), async |handle| {
        match handle.link().del(link.index).execute().await {
            // With the pod's end, meanwhile.
            Err(Error::NetlinkError(error)) if error.raw_code() == -libc::ENODEV => Ok(()),
            other => other,
        }
    });
    Ok(removed?)
}

/// The kernel's C types call an index an int.
fn signed(link: &Link) -> i32 {
    i32::try_from(link.index).unwrap_or(i32::MAX)
}
