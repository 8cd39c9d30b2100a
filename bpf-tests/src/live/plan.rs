//! Who asks whom, and what must come of it. No I/O: the addresses are an argument, the answers are lines of text.

use std::{collections::BTreeSet, fmt, net::IpAddr};

use super::objects::{BALANCER, HOST_PORT, HOST_UDP_PORT, HTTP, PORT, UDP_PORT};

/// What the cluster gave the objects.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// Name and addresses of every pod; of a pod of the host's network those of its node.
    pub(super) pods: Vec<(String, Vec<IpAddr>)>,
    /// Name, cluster IPs and NodePorts (HTTP, UDP; 0 for none) of every Service.
    pub(super) services: Vec<(String, Vec<IpAddr>, [u16; 2])>,
    /// One machine plays both nodes.
    pub(super) one_node: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Probe {
    /// A pod.
    pub(super) from: &'static str,
    pub(super) to: String,
    ask: Ask,
    times: usize,
    pub(super) expect: Expect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ask {
    /// Who answers.
    Name(Target),
    /// Whom the server sees.
    Client(Target),
    /// Who answers, by UDP.
    Udp(Target),
}

type Target = (IpAddr, u16);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Expect {
    /// Each of these answers at least once, and nobody else.
    Each(Vec<&'static str>),
    /// All answers are of the same one of these.
    One(Vec<&'static str>),
    /// The server sees one of these addresses.
    Client(Vec<IpAddr>),
    Refused,
    /// No answer comes at all.
    Dropped,
}

const SERVERS: [&str; 2] = ["server-0", "server-1"];
/// One of two is missed by chance once in half a thousand million.
const OFTEN: usize = 30;
const FEW: usize = 3;

impl Seen {
    /// Before there are policies.
    pub(super) fn open(&self) -> Vec<Probe> {
        let mut probes = self.between_pods();
        probes.extend(self.cluster_ips());
        probes.extend(self.node_ports());
        probes.extend(self.host_ports());
        for from in ["client-0", "client-1"] {
            probes.push(Self::each(from, "load balancer", (BALANCER.parse().ok(), PORT)));
        }
        probes.into_iter().flatten().collect()
    }

    /// With them; rules 43 to 49.
    pub(super) fn guarded(&self) -> Vec<Probe> {
        let mut probes = Vec::new();
        for guarded in self.pod("guarded") {
            let of = |from, port, expect| {
                probe(from, format!("guarded, {guarded}:{port}"), (guarded, port), expect)
            };
            let answers = || Expect::Each(vec!["guarded"]);
            probes.push(of("client-0", HTTP, answers()));
            probes.push(of("client-1", HTTP, Expect::Dropped));
            // The node of the pod is always let in, other nodes are not.
            probes.push(of("host-1", HTTP, answers()));
            probes.extend((!self.one_node).then(|| of("host-0", HTTP, Expect::Dropped)));
            probes.push(of("confined", HTTP, Expect::Dropped));
        }
        probes.extend(self.web_from("confined", &SERVERS));
        for ported in self.pod("ported") {
            probes.push(probe(
                "confined",
                format!("ported, {ported}:{HTTP}"),
                (ported, HTTP),
                Expect::Dropped,
            ));
        }
        probes
    }

    /// Who answers at `web`, for the time when only these have its label.
    pub(super) fn web(&self, by: &[&'static str]) -> Vec<Probe> {
        self.web_from("client-0", by)
    }

    fn web_from(&self, from: &'static str, by: &[&'static str]) -> Vec<Probe> {
        let ips = self.service("web").map(|(ips, _)| ips).unwrap_or_default();
        let each = |ip| Probe {
            times: OFTEN,
            ..probe(from, format!("web, {ip}:{PORT}"), (ip, PORT), Expect::Each(by.to_vec()))
        };
        ips.into_iter().map(each).collect()
    }

    /// Without a Service, addresses stay what they are; the host too.
    fn between_pods(&self) -> Vec<Option<Probe>> {
        let mut probes = Vec::new();
        for from in ["client-0", "client-1", "host-0", "host-1"] {
            let own = self.pod(from);
            for (server, ip) in
                SERVERS.iter().flat_map(|server| self.pod(server).into_iter().map(move |ip| (server, ip)))
            {
                let to = format!("{server}, {ip}:{HTTP}");
                probes.push(Some(probe(from, to.clone(), (ip, HTTP), Expect::Each(vec![server]))));
                if from.starts_with("client") {
                    let same = own.iter().copied().filter(|own| own.is_ipv4() == ip.is_ipv4()).collect();
                    let ask = Ask::Client((ip, HTTP));
                    probes.push(Some(Probe { from, to, ask, times: 1, expect: Expect::Client(same) }));
                }
            }
        }
        probes
    }

    fn cluster_ips(&self) -> Vec<Option<Probe>> {
        let mut probes = Vec::new();
        let ips = |name| self.service(name).map(|(ips, _)| ips).unwrap_or_default();
        for from in ["client-0", "client-1", "host-0", "host-1"] {
            for ip in ips("web") {
                probes.push(Self::each(from, "web", (Some(ip), PORT)));
                let udp = Ask::Udp((ip, UDP_PORT));
                let expect = Expect::Each(SERVERS.into());
                probes.push(Some(Probe {
                    from,
                    to: format!("web, {ip}:{UDP_PORT}/udp"),
                    ask: udp,
                    times: OFTEN,
                    expect,
                }));
            }
            for ip in ips("sticky") {
                let to = format!("sticky, {ip}:{PORT}");
                probes.push(Some(Probe {
                    times: OFTEN,
                    ..probe(from, to, (ip, PORT), Expect::One(SERVERS.into()))
                }));
            }
            for ip in ips("empty") {
                probes.push(Some(probe(from, format!("empty, {ip}:{PORT}"), (ip, PORT), Expect::Refused)));
            }
        }
        probes
    }

    fn node_ports(&self) -> Vec<Option<Probe>> {
        let mut probes = Vec::new();
        let [all, local] =
            ["node-port", "node-port-local"].map(|name| self.service(name).map(|(_, ports)| ports));
        let (Some([all, _]), Some([local, _])) = (all, local) else { return probes };
        for from in ["client-0", "client-1", "host-0", "host-1"] {
            for ip in ["host-0", "host-1"].iter().flat_map(|node| self.pod(node)) {
                probes.push(Self::each(from, "node port", (Some(ip), all)));
            }
            for ip in self.pod("host-0") {
                let to = format!("local node port, {ip}:{local}");
                probes.push(Some(probe(from, to, (ip, local), Expect::Each(vec!["server-0"]))));
            }
        }
        if !self.one_node {
            for ip in self.pod("host-1") {
                // Rules 15 to 17: another node's port is traffic from outside there, the own one is not.
                let to = format!("local node port, {ip}:{local}");
                probes.push(Some(probe("host-0", to.clone(), (ip, local), Expect::Dropped)));
                probes.push(Some(probe("host-1", to, (ip, local), Expect::Each(vec!["server-0"]))));
            }
            for ip in self.pod("host-0") {
                let same =
                    self.pod("host-1").into_iter().filter(|own| own.is_ipv4() == ip.is_ipv4()).collect();
                let (to, ask) = (format!("local node port, {ip}:{local}"), Ask::Client((ip, local)));
                probes.push(Some(Probe { from: "host-1", to, ask, times: 1, expect: Expect::Client(same) }));
            }
        }
        probes
    }

    fn host_ports(&self) -> Vec<Option<Probe>> {
        let mut probes = Vec::new();
        for from in ["client-1", "host-1"].into_iter().filter(|_| !self.one_node) {
            for ip in self.pod("host-0") {
                let expect = Expect::Each(vec!["ported"]);
                probes.push(Some(probe(
                    from,
                    format!("host port, {ip}:{HOST_PORT}"),
                    (ip, HOST_PORT),
                    expect.clone(),
                )));
                let (to, ask) =
                    (format!("host port, {ip}:{HOST_UDP_PORT}/udp"), Ask::Udp((ip, HOST_UDP_PORT)));
                probes.push(Some(Probe { from, to, ask, times: FEW, expect }));
            }
        }
        probes
    }

    fn each(from: &'static str, what: &str, (ip, port): (Option<IpAddr>, u16)) -> Option<Probe> {
        let ip = ip?;
        let to = format!("{what}, {ip}:{port}");
        Some(Probe { times: OFTEN, ..probe(from, to, (ip, port), Expect::Each(SERVERS.into())) })
    }

    fn pod(&self, name: &str) -> Vec<IpAddr> {
        let found = self.pods.iter().find(|(it, _)| it == name);
        found.map(|(_, ips)| ips.clone()).unwrap_or_default()
    }

    fn service(&self, name: &str) -> Option<(Vec<IpAddr>, [u16; 2])> {
        let found = self.services.iter().find(|(it, ..)| it == name);
        found.map(|(_, ips, ports)| (ips.clone(), *ports))
    }
}

fn probe(from: &'static str, to: String, target: Target, expect: Expect) -> Probe {
    Probe { from, to, ask: Ask::Name(target), times: FEW, expect }
}

/// Before what curl says in place of an answer; its exit codes: 7 was refused, 28 ran out of time.
const FAILED: &str = "failed ";

impl Probe {
    /// For the shell of the pod: one line for each time.
    pub(super) fn script(&self) -> String {
        let url = |(ip, port): Target, path: &str| match ip {
            IpAddr::V4(ip) => format!("http://{ip}:{port}/{path}"),
            IpAddr::V6(ip) => format!("http://[{ip}]:{port}/{path}"),
        };
        let curl = |url: String| {
            format!("curl -g -s --connect-timeout 2 --max-time 5 '{url}' || echo '{FAILED}'$?; echo")
        };
        let once = match self.ask {
            Ask::Name(target) => curl(url(target, "hostname")),
            Ask::Client(target) => curl(url(target, "clientip")),
            Ask::Udp((ip, port)) => {
                format!("echo hostname | timeout 3 nc -u -w 1 {ip} {port} || echo '{FAILED}'$?; echo")
            }
        };
        format!("for i in $(seq {}); do {once}; done", self.times)
    }

    /// What the lines say, in words; an error where it is not as expected.
    pub(super) fn judge(&self, output: &str) -> Result<String, String> {
        let lines: Vec<_> = output.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        if lines.is_empty() {
            return Err("no output".into());
        }
        let distinct: BTreeSet<_> = lines.iter().copied().collect();
        let shown = || distinct.iter().copied().collect::<Vec<_>>().join(", ");
        let only = |line: &str| lines.len() == self.times && distinct.len() == 1 && distinct.contains(line);
        let good = match &self.expect {
            Expect::Each(names) => {
                lines.len() == self.times && distinct == names.iter().copied().collect::<BTreeSet<_>>()
            }
            Expect::One(names) => names.iter().any(|name| only(name)),
            Expect::Client(ips) => lines.iter().all(|line| sees(line).is_some_and(|ip| ips.contains(&ip))),
            Expect::Refused => only("failed 7"),
            Expect::Dropped => only("failed 28"),
        };
        if good { Ok(shown()) } else { Err(format!("{} lines: {}", lines.len(), shown())) }
    }
}

/// The address in `10.0.0.1:4000` or `[fd00::1]:4000`.
fn sees(line: &str) -> Option<IpAddr> {
    line.parse::<std::net::SocketAddr>().ok().map(|seen| seen.ip().to_canonical())
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Each(names) => write!(f, "answers of {}", names.join(" and ")),
            Self::One(names) => write!(f, "answers of one of {}", names.join(" and ")),
            Self::Client(ips) => write!(f, "the client is {ips:?}"),
            Self::Refused => f.write_str("refused"),
            Self::Dropped => f.write_str("no answer"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::objects::{PODS, SERVICES};
    use super::*;

    fn seen() -> Seen {
        let both = |net: u8, host: usize| {
            vec![
                format!("10.{net}.0.{host}").parse().unwrap(),
                format!("fd00:{net}::{host}").parse().unwrap(),
            ]
        };
        let pods = PODS.iter().enumerate().map(|(at, (name, _))| ((*name).to_owned(), both(1, at + 1)));
        let services = SERVICES.iter().enumerate().map(|(at, name)| {
            ((*name).to_owned(), both(96, at + 1), [30_000 + at as u16, 31_000 + at as u16])
        });
        Seen { pods: pods.collect(), services: services.collect(), one_node: false }
    }

    fn of<'a>(probes: &'a [Probe], from: &str, to: &str) -> &'a Probe {
        let found = probes.iter().find(|probe| probe.from == from && probe.to.starts_with(to));
        found.unwrap_or_else(|| panic!("nobody asks {to} from {from}: {probes:#?}"))
    }

    #[test]
    fn every_client_asks_every_kind_of_service_over_both_families() {
        let probes = seen().open();
        for from in ["client-0", "client-1", "host-0", "host-1"] {
            for to in [
                "server-0, 10.1.0.1:8080",
                "server-1, fd00:1::2:8080",
                "web, 10.96.0.1:80",
                "web, fd00:96::1:81/udp",
                "sticky, 10.96.0.2:80",
                "node port, 10.1.0.5:30003",
                "node port, fd00:1::6:30003",
            ] {
                of(&probes, from, to);
            }
            assert_eq!(of(&probes, from, "empty, fd00:96::3").expect, Expect::Refused);
        }
        of(&probes, "client-0", "load balancer, 192.0.2.80:80");
        of(&probes, "host-1", "host port, 10.1.0.5:28080");
        assert_eq!(of(&probes, "host-0", "local node port, 10.1.0.6:30004").expect, Expect::Dropped);
        assert_eq!(
            of(&probes, "host-1", "local node port, 10.1.0.6:30004").expect,
            Expect::Each(vec!["server-0"])
        );
    }

    #[test]
    fn one_node_is_asked_only_what_one_node_can_show() {
        let one = Seen { one_node: true, ..seen() };
        assert!(!one.open().is_empty() && one.open().len() < seen().open().len());
        assert!(one.open().iter().all(|probe| probe.expect != Expect::Dropped));
        assert!(one.guarded().iter().all(|probe| probe.from != "host-0"));
    }

    #[test]
    fn policies_let_in_whom_they_name_and_the_pods_own_node() {
        let probes = seen().guarded();
        for (from, expect) in [
            ("client-0", Expect::Each(vec!["guarded"])),
            ("client-1", Expect::Dropped),
            ("host-1", Expect::Each(vec!["guarded"])),
            ("host-0", Expect::Dropped),
            ("confined", Expect::Dropped),
        ] {
            assert_eq!(of(&probes, from, "guarded").expect, expect, "{from}");
        }
        assert_eq!(of(&probes, "confined", "web").expect, Expect::Each(SERVERS.into()));
        assert_eq!(of(&probes, "confined", "ported").expect, Expect::Dropped);
    }

    #[test]
    fn output_is_judged_line_by_line() {
        let of = |times, expect| Probe {
            times,
            ..probe("client-0", "x".into(), ([10, 0, 0, 1].into(), 80), expect)
        };
        let each = of(3, Expect::Each(SERVERS.into()));
        assert!(each.judge("server-0\n\nserver-1\nserver-0\n").is_ok());
        for bad in [
            "server-0\nserver-0\nserver-0",
            "server-0\nserver-1",
            "server-0\nserver-1\nfailed 28",
            "",
            "other\nserver-0\nserver-1",
        ] {
            assert!(each.judge(bad).is_err(), "{bad:?}");
        }
        assert!(of(2, Expect::One(SERVERS.into())).judge("server-1\nserver-1").is_ok());
        assert!(of(2, Expect::One(SERVERS.into())).judge("server-1\nserver-0").is_err());
        let client = of(1, Expect::Client(vec!["fd00::1".parse().unwrap()]));
        assert!(client.judge("[fd00::1]:4000").is_ok() && client.judge("[fd00::2]:4000").is_err());
        assert!(of(1, Expect::Client(vec![[10, 0, 0, 1].into()])).judge("[::ffff:10.0.0.1]:4000").is_ok());
        assert!(
            of(1, Expect::Refused).judge("failed 7").is_ok()
                && of(1, Expect::Refused).judge("failed 28").is_err()
        );
        assert!(
            of(1, Expect::Dropped).judge("failed 28").is_ok()
                && of(1, Expect::Dropped).judge("server-0").is_err()
        );
    }

    #[test]
    fn scripts_are_what_a_shell_takes() {
        for probe in seen().open().iter().chain(&seen().guarded()) {
            let script = probe.script();
            let checked = std::process::Command::new("sh").args(["-n", "-c", &script]).status().unwrap();
            assert!(checked.success(), "{script}");
        }
        let script = seen().web(&["server-0"])[1].script();
        assert!(script.contains("'http://[fd00:96::1]:80/hostname'"), "{script}");
    }
}
