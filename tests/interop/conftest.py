import pytest
import servers


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    return servers.Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def synapse(tmp_path_factory, certificates):
    server = servers.Synapse(tmp_path_factory.getbasetemp() / "synapse", certificates)
    yield server
    server.close()


@pytest.fixture(scope="session")
def ours(tmp_path_factory, certificates):
    """The server under test."""
    server = servers.subject_class()(tmp_path_factory.getbasetemp() / "ours", certificates)
    yield server
    server.close()


@pytest.fixture
def mortal(tmp_path, certificates):
    """A server under test that the test may kill."""
    server = servers.subject_class()(tmp_path / "mortal", certificates)
    yield server
    server.close()


@pytest.fixture(params=["10", "11", "12"])
def version(request):
    return request.param
