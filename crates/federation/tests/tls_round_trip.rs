//! The real transport against a real TLS listener on loopback.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use federation::discovery::{Dns, Service};
use federation::transport::{HeaderMap, Method, Request, collect};
use federation::{HyperTransport, IpRanges, Transport, TransportError, TransportOptions};
use futures::future::BoxFuture;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use protocol::id::ServerName;
use rustls_pki_types::PrivateKeyDer;
use tokio::net::TcpListener;

const TIMEOUT: Duration = Duration::from_secs(10);

/// Every name is this address; `_matrix-fed._tcp` names its port.
struct Loopback(SocketAddr);

impl Dns for Loopback {
    fn addresses<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Vec<IpAddr>, String>> {
        Box::pin(async { Ok(vec![self.0.ip()]) })
    }

    fn services<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Vec<Service>, String>> {
        Box::pin(async {
            Ok(vec![Service {
                priority: 1,
                weight: 1,
                port: self.0.port(),
                host: "elsewhere.test".into(),
            }])
        })
    }
}

struct Server {
    address: SocketAddr,
    /// PEM file of the authority that signed its certificate.
    authority: tempfile::NamedTempFile,
    /// How many connections it took.
    taken: Arc<AtomicUsize>,
}

/// Answers with the protocol, the method, the target, the Host and the length of the body.
async fn answer(
    request: hyper::Request<Incoming>,
) -> Result<hyper::Response<Full<Bytes>>, hyper::Error> {
    let host = match request.headers().get("host") {
        Some(host) => host.to_str().unwrap().to_owned(),
        None => request.uri().authority().unwrap().to_string(),
    };
    let target = request.uri().path_and_query().unwrap().to_string();
    let (version, method) = (request.version(), request.method().clone());
    let body = request.into_body().collect().await?.to_bytes();
    let text = format!("{version:?} {method} {target} {host} {}", body.len());
    Ok(hyper::Response::new(Full::new(Bytes::from(text))))
}

async fn serve(names: &[&str], alpn: &[&[u8]]) -> Server {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_cert = ca.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
    let cert = rcgen::CertificateParams::new(names)
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();

    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![cert.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let taken = Arc::<AtomicUsize>::default();
    let taking = Arc::clone(&taken);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            taking.fetch_add(1, Ordering::Relaxed);
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // A client that does not trust us hangs up: that is one of the tests.
                if let Ok(stream) = acceptor.accept(stream).await {
                    let builder =
                        hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                    let io = TokioIo::new(stream);
                    let _ = builder.serve_connection(io, service_fn(answer)).await;
                }
            });
        }
    });
    let authority = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(authority.path(), ca_cert.pem()).unwrap();
    Server {
        address,
        authority,
        taken,
    }
}

fn transport(server: &Server, verify_tls: bool, allow: &[&str]) -> HyperTransport {
    let allow: Vec<String> = allow.iter().map(|a| (*a).to_owned()).collect();
    let options = TransportOptions {
        verify_tls,
        extra_ca_files: vec![server.authority.path().to_owned()],
        ip_ranges: IpRanges::public_and(&allow).unwrap(),
    };
    HyperTransport::with_dns(&options, Arc::new(Loopback(server.address))).unwrap()
}

async fn ask(transport: &HyperTransport, to: &str) -> Result<String, TransportError> {
    let response = transport
        .send(Request {
            to: ServerName::parse(to).unwrap(),
            method: Method::PUT,
            path_and_query: "/a/%2Fb?c=%20d".into(),
            headers: HeaderMap::new(),
            body: Some(Bytes::from_static(b"12345")),
            timeout: TIMEOUT,
        })
        .await?;
    let body = collect(response, 1000).await?;
    Ok(String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn a_request_comes_through_over_http_1_and_2() {
    let h1 = serve(&["a.test"], &[b"http/1.1"]).await;
    assert_eq!(
        ask(&transport(&h1, true, &["127.0.0.0/8"]), "a.test").await,
        Ok("HTTP/1.1 PUT /a/%2Fb?c=%20d a.test 5".into())
    );
    let h2 = serve(&["a.test"], &[b"h2", b"http/1.1"]).await;
    assert_eq!(
        ask(&transport(&h2, true, &["127.0.0.0/8"]), "a.test").await,
        Ok("HTTP/2.0 PUT /a/%2Fb?c=%20d a.test 5".into())
    );
}

#[tokio::test]
async fn host_and_certificate_follow_the_name_and_not_the_address() {
    let server = serve(&["a.test", "127.0.0.1"], &[]).await;
    let transport = transport(&server, true, &["127.0.0.0/8"]);
    let port = server.address.port();
    for name in [format!("a.test:{port}"), format!("127.0.0.1:{port}")] {
        assert_eq!(
            ask(&transport, &name).await,
            Ok(format!("HTTP/1.1 PUT /a/%2Fb?c=%20d {name} 5"))
        );
    }
    let wrong = ask(&transport, "b.test").await;
    assert!(
        matches!(&wrong, Err(TransportError::Connect { reason, .. }) if reason.contains("certificate")),
        "{wrong:?}"
    );
}

#[tokio::test]
async fn an_unknown_authority_is_refused_unless_told_otherwise() {
    let server = serve(&["a.test"], &[]).await;
    let other = serve(&["a.test"], &[]).await;
    let deceived = Server {
        address: server.address,
        authority: other.authority,
        taken: Arc::default(),
    };
    let strict = ask(&transport(&deceived, true, &["127.0.0.0/8"]), "a.test").await;
    assert!(
        matches!(strict, Err(TransportError::Connect { .. })),
        "{strict:?}"
    );
    let lax = ask(&transport(&deceived, false, &["127.0.0.0/8"]), "a.test").await;
    assert!(lax.is_ok(), "{lax:?}");
}

#[tokio::test]
async fn loopback_is_not_contacted_unless_allowed() {
    let server = serve(&["a.test"], &[]).await;
    let denied = ask(&transport(&server, true, &[]), "a.test").await;
    assert!(
        matches!(&denied, Err(TransportError::Connect { reason, .. }) if reason.contains("not allowed")),
        "{denied:?}"
    );
}

#[tokio::test]
async fn a_closed_port_is_a_failure_to_connect() {
    let server = serve(&["a.test"], &[]).await;
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let nobody = Server { address, ..server };
    let transport = transport(&nobody, true, &["127.0.0.0/8"]);
    let reached = transport.reach(&ServerName::parse("a.test").unwrap()).await;
    assert!(
        matches!(reached, Err(TransportError::Connect { .. })),
        "{reached:?}"
    );
    let answer = ask(&transport, "a.test").await;
    assert!(
        matches!(answer, Err(TransportError::Connect { .. })),
        "{answer:?}"
    );
}

#[tokio::test]
async fn the_connection_that_shows_that_somebody_listens_serves_the_next_request() {
    let server = serve(&["a.test"], &[b"h2"]).await;
    let name = ServerName::parse("a.test").unwrap();
    let transport = transport(&server, true, &["127.0.0.0/8"]);
    transport.reach(&name).await.unwrap();
    let answer = ask(&transport, "a.test").await.unwrap();
    assert!(answer.starts_with("HTTP/2.0 PUT"), "{answer}");
    assert_eq!(server.taken.load(Ordering::Relaxed), 1);
    let denied = self::transport(&server, true, &[]).reach(&name).await;
    assert!(
        matches!(&denied, Err(TransportError::Connect { reason, .. }) if reason.contains("not allowed")),
        "{denied:?}"
    );
}

#[tokio::test]
async fn a_connection_that_was_closed_meanwhile_is_opened_anew() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let name = ServerName::parse("a.test").unwrap();
    let server = serve(&["a.test"], &[]).await;
    let front = server.address;
    let at = Server { address, ..server };
    let transport = transport(&at, true, &["127.0.0.0/8"]);
    transport.reach(&name).await.unwrap();
    drop(listener.accept().await.unwrap());
    let relay = async {
        let (mut here, _) = listener.accept().await.unwrap();
        let mut there = tokio::net::TcpStream::connect(front).await.unwrap();
        let _end = tokio::io::copy_bidirectional(&mut here, &mut there).await;
    };
    tokio::select! {
        answer = ask(&transport, "a.test") => assert!(answer.unwrap().contains("PUT")),
        () = relay => panic!("the relay ended first"),
    }
}

struct SilentDns;

impl Dns for SilentDns {
    fn addresses<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Vec<IpAddr>, String>> {
        Box::pin(std::future::pending())
    }

    fn services<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Vec<Service>, String>> {
        Box::pin(std::future::pending())
    }
}

#[tokio::test(start_paused = true)]
async fn a_name_that_nobody_resolves_does_not_hold_up_who_asks_for_it() {
    let options = TransportOptions {
        verify_tls: false,
        extra_ca_files: Vec::new(),
        ip_ranges: IpRanges::public_and(&[]).unwrap(),
    };
    let transport = HyperTransport::with_dns(&options, Arc::new(SilentDns)).unwrap();
    let reached = transport.reach(&ServerName::parse("a.test").unwrap()).await;
    assert!(
        matches!(&reached, Err(TransportError::Connect { reason, .. }) if reason.contains("too long")),
        "{reached:?}"
    );
}
