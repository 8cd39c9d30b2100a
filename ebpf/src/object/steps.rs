//! The steps as global functions: the verifier follows each once, with any packet and any number, and not once for every
//! call and every state at the call. What they take and give are a program's context and numbers, because before 6.1 the
//! kernel lets global functions have nothing else.

use core::ptr::NonNull;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::info;
use ferroflow_common::family::{V4, V6};
use ferroflow_common::verdict::{DROP_ROWS, DropReason};
use ferroflow_ebpf::fragment::{self, Part};
use ferroflow_ebpf::icmp::{self, Changes, Quote};
use ferroflow_ebpf::policy::Wanted;
use ferroflow_ebpf::service::{Origin, Outcome, Way};
use ferroflow_ebpf::steps::Steps;
use ferroflow_ebpf::{conntrack, device, judge, masquerade, pod, policy, relay, service};

use crate::maps::Kernel;
use crate::skb::Skb;

/// Global functions of a packet. The compiler may not inline them: in their caller they would be followed once a path.
macro_rules! global {
    ($(fn $name:ident($skb:ident, $($argument:ident: $number:ty),*) $body:block)*) => {$(
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $name($skb: *mut __sk_buff, $($argument: $number),*) -> u64 {
            // SAFETY: a program's context, which is never null; the verifier admits nothing else here.
            let $skb = &mut Skb(TcContext::new(unsafe { NonNull::new_unchecked($skb) }));
            $body.0
        }
    )*};
}

/// The functions of one family, each under a name of its own, and the trait that calls them.
macro_rules! steps {
    (
        $family:ty, $leave:ident, $arrive:ident, $enter:ident, $mend:ident, $choose:ident, $track:ident, $refuse:ident,
        $choose_here:ident, $judge:ident, $track_plain:ident, $portless:ident,
        $find_error:ident, $deliver_error:ident, $requote_error:ident, $mend_error:ident,
        $find_fragment:ident, $first_fragment:ident, $later_fragment:ident, $remember_fragment:ident,
        $masquerade:ident, $echo:ident
    ) => {
        global! {
            fn $leave(skb, way: u32) {
                Outcome::of(pod::leave::<$family, _, _>(skb, &Kernel, Way(way)))
            }
            fn $arrive(skb, way: u32, origin: u32) {
                let origin = Origin::from_number(origin);
                Outcome::of(device::arrive::<$family, _, _>(skb, &Kernel, Way(way), origin))
            }
            fn $enter(skb, way: u32, origin: u32) {
                Outcome::of(pod::enter::<$family, _, _>(skb, &Kernel, Way(way), Origin::from_number(origin)))
            }
            fn $judge(skb, flow: u64, origin: u32) {
                let origin = Origin::from_number(origin);
                Outcome::of(judge::judge::<$family, _, _>(skb, &Kernel, Outcome(flow), origin))
            }
            fn $track_plain(skb, admitted: u64) {
                Outcome::of(judge::track::<$family, _, _>(skb, &Kernel, Outcome(admitted)))
            }
            fn $portless(skb, origin: u32) {
                Outcome::of(judge::portless::<$family, _, _>(skb, &Kernel, Origin::from_number(origin)))
            }
            fn $mend(skb, ) {
                conntrack::mend::<$family, _, _>(skb, &Kernel);
                NOTHING
            }
            fn $choose(skb, origin: u32) {
                Outcome::of(service::choose::<$family, _, _>(skb, &Kernel, Origin::from_number(origin)))
            }
            fn $choose_here(skb, ) {
                Outcome::of(relay::choose::<$family, _, _>(skb, &Kernel))
            }
            fn $track(skb, chosen: u64) {
                Outcome::of(service::track::<$family, _, _>(skb, &Kernel, Outcome(chosen)))
            }
            fn $refuse(skb, ) {
                Outcome::of(service::refuse::<$family, _>(skb))
            }
            fn $find_error(skb, ) {
                icmp::find::<$family, _>(skb)
            }
            fn $deliver_error(skb, quote: u64, origin: u32) {
                let origin = Origin::from_number(origin);
                Outcome::of(icmp::deliver::<$family, _, _>(skb, &Kernel, Quote(quote), origin))
            }
            fn $requote_error(skb, quote: u64) {
                icmp::requote::<$family, _, _>(skb, &Kernel, Quote(quote))
            }
            fn $mend_error(skb, quote: u64, changes: u64) {
                let mended = icmp::mend::<$family, _>(skb, Quote(quote), Changes(changes));
                Outcome::of(mended.map(|()| NOTHING))
            }
            fn $find_fragment(skb, ) {
                fragment::find::<$family, _>(skb)
            }
            fn $first_fragment(skb, part: u64, origin: u32) {
                let origin = Origin::from_number(origin);
                Outcome::of(fragment::first::<$family, _, _>(skb, &Kernel, Part(part), origin))
            }
            fn $later_fragment(skb, part: u64, origin: u32) {
                let origin = Origin::from_number(origin);
                Outcome::of(fragment::later::<$family, _, _>(skb, &Kernel, Part(part), origin))
            }
            fn $remember_fragment(skb, outcome: u64, origin: u32) {
                let origin = Origin::from_number(origin);
                fragment::remember::<$family, _, _>(skb, &Kernel, Outcome(outcome), origin);
                NOTHING
            }
            fn $masquerade(skb, ) {
                Outcome::of(masquerade::open::<$family, _, _>(skb, &Kernel))
            }
            fn $echo(skb, origin: u32) {
                let origin = Origin::from_number(origin);
                Outcome::of(masquerade::known_echo::<$family, _, _>(skb, &Kernel, origin))
            }
        }

        impl Steps<$family, Skb> for Kernel {
            #[inline(always)]
            fn known(&self, packet: &mut Skb, origin: Origin, Way(way): Way) -> Outcome {
                Outcome(match origin {
                    Origin::Pod => $leave(context(packet), way),
                    Origin::Outside | Origin::Tunnel | Origin::Relay => {
                        $arrive(context(packet), way, origin as u32)
                    }
                    Origin::Node | Origin::Inward | Origin::Own | Origin::Exit => {
                        $enter(context(packet), way, origin as u32)
                    }
                })
            }

            #[inline(always)]
            fn judge(&self, packet: &mut Skb, Outcome(flow): Outcome, origin: Origin) -> Outcome {
                Outcome($judge(context(packet), flow, origin as u32))
            }

            #[inline(always)]
            fn track_plain(&self, packet: &mut Skb, Outcome(admitted): Outcome) -> Outcome {
                Outcome($track_plain(context(packet), admitted))
            }

            #[inline(always)]
            fn portless(&self, packet: &mut Skb, origin: Origin) -> Outcome {
                Outcome($portless(context(packet), origin as u32))
            }

            #[inline(always)]
            fn mend(&self, packet: &mut Skb) {
                $mend(context(packet));
            }

            #[inline(always)]
            fn choose(&self, packet: &mut Skb, origin: Origin) -> Outcome {
                Outcome(match origin {
                    Origin::Relay => $choose_here(context(packet)),
                    Origin::Tunnel => $choose(context(packet), Origin::Outside as u32),
                    Origin::Pod
                    | Origin::Outside
                    | Origin::Node
                    | Origin::Inward
                    | Origin::Own
                    | Origin::Exit => $choose(context(packet), origin as u32),
                })
            }

            #[inline(always)]
            fn track_flow(&self, packet: &mut Skb, Outcome(chosen): Outcome) -> Outcome {
                Outcome($track(context(packet), chosen))
            }

            #[inline(always)]
            fn refuse(&self, packet: &mut Skb) -> Outcome {
                Outcome($refuse(context(packet)))
            }

            #[inline(always)]
            fn find_error(&self, packet: &mut Skb) -> Quote {
                Quote($find_error(context(packet)))
            }

            #[inline(always)]
            fn deliver_error(&self, packet: &mut Skb, Quote(quote): Quote, origin: Origin) -> Outcome {
                Outcome($deliver_error(context(packet), quote, origin as u32))
            }

            #[inline(always)]
            fn requote_error(&self, packet: &mut Skb, Quote(quote): Quote) -> Changes {
                Changes($requote_error(context(packet), quote))
            }

            #[inline(always)]
            fn mend_error(
                &self,
                packet: &mut Skb,
                Quote(quote): Quote,
                Changes(changes): Changes,
            ) -> Outcome {
                Outcome($mend_error(context(packet), quote, changes))
            }

            #[inline(always)]
            fn find_fragment(&self, packet: &mut Skb) -> Part {
                Part($find_fragment(context(packet)))
            }

            #[inline(always)]
            fn first_fragment(&self, packet: &mut Skb, Part(part): Part, origin: Origin) -> Outcome {
                Outcome($first_fragment(context(packet), part, origin as u32))
            }

            #[inline(always)]
            fn later_fragment(&self, packet: &mut Skb, Part(part): Part, origin: Origin) -> Outcome {
                Outcome($later_fragment(context(packet), part, origin as u32))
            }

            #[inline(always)]
            fn remember_fragment(&self, packet: &mut Skb, Outcome(outcome): Outcome, origin: Origin) {
                $remember_fragment(context(packet), outcome, origin as u32);
            }

            #[inline(always)]
            fn masquerade_flow(&self, packet: &mut Skb) -> Outcome {
                Outcome($masquerade(context(packet)))
            }

            #[inline(always)]
            fn known_echo(&self, packet: &mut Skb, origin: Origin) -> Outcome {
                Outcome($echo(context(packet), origin as u32))
            }
        }
    };
}

/// Logs what became of a packet for the reason with this number. A function of its own: it is compiled out by the verifier
/// unless the agent raises AYA_LOG_LEVEL when it loads, and long.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn log(reason: u32) -> u64 {
    let line = &LINES[reason as usize % DROP_ROWS];
    // SAFETY: lines are cut from text, and filled with spaces.
    info!((), "{}", unsafe { core::str::from_utf8_unchecked(line) });
    NOTHING.0
}

/// All of one length: the verifier would follow the log once for each other length of what is logged.
static LINES: [[u8; LINE]; DROP_ROWS] = lines();
const LINE: usize = 40;
const _: () = assert!(DROP_ROWS.is_power_of_two());

const fn lines() -> [[u8; LINE]; DROP_ROWS] {
    let mut lines = [[b' '; LINE]; DROP_ROWS];
    let mut reason = 0;
    while reason < DropReason::ALL.len() {
        let text = DropReason::ALL[reason].line().as_bytes();
        assert!(text.len() <= LINE);
        let mut at = 0;
        while at < text.len() {
            lines[DropReason::ALL[reason] as usize][at] = text[at];
            at += 1;
        }
        reason += 1;
    }
    lines
}

/// What a policy set says of a class of peers, and of what is at a [`Wanted::place`]: a [`Verdict`]'s number.
///
/// [`Verdict`]: ferroflow_common::abi::policy::Verdict
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn weigh(set: u32, class: u32, wanted: u32) -> u64 {
    policy::allowed(&Kernel, set, class, Wanted::at(wanted)) as u64
}

/// Of a step that has nothing to say.
const NOTHING: Outcome = Outcome(0);

#[inline(always)]
fn context(packet: &Skb) -> *mut __sk_buff {
    packet.0.as_ptr().cast()
}

steps!(
    V4,
    leave_v4,
    arrive_v4,
    enter_v4,
    mend_v4,
    choose_v4,
    track_v4,
    refuse_v4,
    choose_here_v4,
    judge_v4,
    track_plain_v4,
    portless_v4,
    find_error_v4,
    deliver_error_v4,
    requote_error_v4,
    mend_error_v4,
    find_fragment_v4,
    first_fragment_v4,
    later_fragment_v4,
    remember_fragment_v4,
    masquerade_v4,
    echo_v4
);
steps!(
    V6,
    leave_v6,
    arrive_v6,
    enter_v6,
    mend_v6,
    choose_v6,
    track_v6,
    refuse_v6,
    choose_here_v6,
    judge_v6,
    track_plain_v6,
    portless_v6,
    find_error_v6,
    deliver_error_v6,
    requote_error_v6,
    mend_error_v6,
    find_fragment_v6,
    first_fragment_v6,
    later_fragment_v6,
    remember_fragment_v6,
    masquerade_v6,
    echo_v6
);
