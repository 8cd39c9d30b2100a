//! Ports of the host that lead to pods of this node.

use super::*;
use crate::events::Reason;
use crate::model::{At, Family, HostPort, HostPorts};

fn port(at: At, proto: Proto, port: u16, container_port: u16) -> HostPort {
    HostPort::new(at, proto, Port::new(port), Port::new(container_port))
}

fn one(text: &str) -> At {
    At::One(addr(text))
}

fn ports(interface: &str, addresses: &[&str], ports: Vec<HostPort>) -> Change {
    let addresses = addresses.iter().map(|text| addr(text)).collect();
    Change::HostPorts(interface.into(), Some(HostPorts::new(addresses, ports)))
}

fn without(interface: &str) -> Change {
    Change::HostPorts(interface.into(), None)
}

fn own_address(text: &str) -> Change {
    Change::LocalAddress(addr(text), Some(3))
}

fn lines(run: &Run) -> Vec<String> {
    run.view().into_iter().map(|(frontend, backends)| format!("{frontend} {backends}")).collect()
}

#[test]
fn a_port_is_at_every_address_or_at_one_while_the_host_has_it() {
    let mut run = Run::new();
    let both = ["10.244.1.2", "fd00:1::2"];
    let first = ports(
        "ff1",
        &both,
        vec![
            port(At::Every, Proto::TCP, 80, 8080),
            port(At::EveryOf(Family::V6), Proto::UDP, 53, 5353),
            port(one("192.168.5.1"), Proto::TCP, 81, 8080),
            port(one("127.0.0.1"), Proto::TCP, 82, 8080),
        ],
    );
    run.apply(&[first, ports("ff2", &both[..1], vec![port(At::Every, Proto::UDP, 80, 9)])]);
    let everywhere = [
        "0.0.0.0:80/TCP 10.244.1.2:8080",
        "0.0.0.0:80/UDP 10.244.1.2:9",
        "127.0.0.1:82/TCP own 10.244.1.2:8080",
        ":::53/UDP fd00:1::2:5353",
        ":::80/TCP fd00:1::2:8080",
    ];
    assert_eq!(lines(&run), everywhere, "192.168.5.1 is not the host's");
    run.apply(&[own_address("192.168.5.1")]);
    assert!(lines(&run).contains(&"192.168.5.1:81/TCP 10.244.1.2:8080".to_owned()), "{:?}", lines(&run));
    run.apply(&[Change::LocalAddress(addr("192.168.5.1"), None)]);
    assert_eq!(lines(&run), everywhere, "rule 25");
    run.apply(&[without("ff1"), without("ff2")]);
    assert_eq!((run.view().len(), live(run.it.maps()).len(), run.stats().services), (0, 0, 0));
}

#[test]
fn rule_33_the_backend_of_a_pod_that_is_gone_has_another_generation() {
    let mut run = Run::new();
    let to = |addr| ports("ff1", &[addr], vec![port(At::Every, Proto::UDP, 53, 53)]);
    run.apply(&[to("10.244.1.2")]);
    let (index, row) = row_of(run.it.maps(), "10.244.1.2");
    run.apply(&[without("ff1"), ports("ff2", &["10.244.1.3"], vec![port(At::Every, Proto::UDP, 53, 53)])]);
    assert_eq!(lines(&run), ["0.0.0.0:53/UDP 10.244.1.3:53"]);
    let now = run.it.maps().read::<Backends>(index).unwrap();
    assert_ne!((now.generation, now.flags), (row.generation, row.flags));
}

#[test]
fn a_service_goes_before_a_port_of_the_host_whoever_comes_first() {
    for service_first in [true, false] {
        let mut run = Run::new();
        let mut changes = [
            service("web", &["10.96.0.1"], &["http:80/30080"]),
            slice("web-1", "web", &["10.0.0.1"]),
            ports(
                "ff1",
                &["10.244.1.2"],
                vec![port(At::Every, Proto::TCP, 30080, 80), port(At::Every, Proto::TCP, 30081, 80)],
            ),
        ];
        if !service_first {
            changes.reverse();
        }
        for change in changes {
            run.handle(&[change]).settle();
        }
        let expected = [
            "0.0.0.0:30080/TCP 10.0.0.1:8080",
            "0.0.0.0:30081/TCP 10.244.1.2:80",
            "10.96.0.1:80/TCP 10.0.0.1:8080",
        ];
        assert_eq!(lines(&run), expected);
        let errors = run.errors().join("\n");
        let says = ["hostPorts of ff1", "NodePort 30080/TCP", "Service default/web"];
        assert!(says.iter().all(|text| errors.contains(text)), "{errors}");
        assert!(run.it.missing_host_ports("ff1").is_some() && run.it.missing_host_ports("ff2").is_none());
        assert!(
            run.it.take_notes().iter().all(|note| note.reason != Reason::ServiceConflict),
            "nobody's object"
        );
        run.apply(&[gone("web")]);
        assert!(lines(&run).contains(&"0.0.0.0:30080/TCP 10.244.1.2:80".to_owned()), "it is free now");
    }
}

#[test]
fn a_restart_writes_nothing_and_takes_away_what_is_gone() {
    let mut run = Run::new();
    let kept = ports(
        "ff1",
        &["10.244.1.2"],
        vec![
            port(At::Every, Proto::TCP, 80, 80),
            port(one("::1"), Proto::TCP, 80, 80),
            port(one("127.0.0.1"), Proto::TCP, 80, 80),
        ],
    );
    run.apply(&[kept.clone(), ports("ff2", &["10.244.1.3"], vec![port(At::Every, Proto::TCP, 81, 80)])]);
    let before = lines(&run);
    assert_eq!(before.len(), 3, "{before:?}");
    let mut next = Run::restart(run.it.maps().clone());
    let writes = next.stats().writes;
    next.handle(&[kept]);
    // Documents that cannot be read say nothing of pods that this agent attached.
    next.it.hold(Withheld::Any, next.now);
    next.it.synced();
    next.settle();
    assert_eq!(lines(&next), before[..1].iter().chain(&before[2..]).cloned().collect::<Vec<_>>());
    let removed = next.stats().writes - writes;
    assert_eq!(removed, 3, "a frontend, a backend and a name");
}
